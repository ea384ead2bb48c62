"""`shared_prefix(model, prefix)`: a plain transformers model that has, for a while, read a text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..kv_prefix import KVPrefix
from .interface import PREFIX_ARGUMENT, AttentionPath, LayerPrefix, WindowReading, with_shared_prefix
from .layers import execution_device, find_attention_layers, find_decoder
from .positions import PositionShift


@contextlib.contextmanager
def shared_prefix(
    model: nn.Module,
    prefix: KVPrefix,
    *,
    attention: AttentionPath = "auto",
    sliding_window: WindowReading = "windowed",
) -> Iterator[nn.Module]:
    """Makes every row of every batch attend to `prefix`, in `forward` and `generate`, without copying it per row.

    The result is that of passing the prefix as `past_key_values` to every row (`KVPrefix.to_cache`), with positions
    and padding taken care of. Afterwards, also after an exception, the model is what it was. Contexts nest: each adds
    its prefix, and inside an active cartridge they add to the cartridge.

    Args:
        model: A transformers causal LM, or a PEFT model around one.
        prefix: Keys and values made by the same model; see `KVPrefix.from_text`.
        attention: `auto` (fast), `merged` or `concatenated` (the plain reference, for debugging).
        sliding_window: What sliding-window layers make of it: `windowed`, prefix tokens leave the window as any token
            does; `pinned`, they stay visible.

    Example:

    ```python
    prefix = KVPrefix.from_text(model, tokenizer, document)
    with shared_prefix(model, prefix):
        model.generate(**tokenizer(questions, padding=True, return_tensors="pt"))
    ```

    Raises:
        ValueError: `prefix` was made by a model of another shape.
        UnsupportedModelError: the model has layers that cannot hold a prefix.
    """
    layers = find_attention_layers(model)
    _check_prefix(prefix, layers)
    _, decoder = find_decoder(model, layers)
    with contextlib.ExitStack() as stack:
        num_tokens = prefix.num_tokens
        shift = PositionShift(decoder, lambda batch_size: num_tokens)
        stack.callback(decoder.register_forward_pre_hook(shift, with_kwargs=True).remove)
        for layer, key, value in zip(layers, prefix.keys, prefix.values, strict=True):
            for module in (layer.module, *(reader for _, reader in layer.readers)):
                device = execution_device(module)
                part = LayerPrefix(key.to(device), value.to(device), None, attention, sliding_window)
                stack.callback(setattr, module, "config", module.config)
                module.config = with_shared_prefix(module.config)
                stack.callback(module.register_forward_pre_hook(_PrefixHook(part), with_kwargs=True).remove)
        yield model


class _PrefixHook:
    """Hands one layer its prefix, after those that were given already."""

    def __init__(self, part: LayerPrefix) -> None:
        self.part = part

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, PREFIX_ARGUMENT: (*kwargs.get(PREFIX_ARGUMENT, ()), self.part)}


def _check_prefix(prefix: KVPrefix, layers: list[Any]) -> None:
    have = [(key.shape[0], key.shape[2], value.shape[2]) for key, value in zip(prefix.keys, prefix.values, strict=True)]
    want = [(layer.num_key_value_heads, layer.key_dim, layer.value_dim) for layer in layers]
    if have == want:
        return
    if len(have) != len(want):
        difference = f"{len(have)} layers, the model {len(want)}"
    else:
        index = next(i for i, pair in enumerate(zip(have, want, strict=True)) if pair[0] != pair[1])
        difference = (
            f"(num_key_value_heads, key_dim, value_dim) = {have[index]} in layer {index}, "
            f"`{layers[index].name}` {want[index]}"
        )
    raise ValueError(f"`prefix` was made by another model: it has {difference}.")
