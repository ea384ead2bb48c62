"""`shared_prefix(model, prefix)`: a plain transformers model that has, for a while, read a text."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any

from torch import Tensor, nn

from ..kv_prefix import KVPrefix
from ..recurrent import CacheMemory, RecurrentLayer
from .callers import frames, generator_that_opens, thread_and_task
from .delivery import OPEN, prefix_host
from .interface import AttentionPath, LayerPrefix, WindowReading, expand_tokens
from .probe import AttentionLayer, execution_device


class SharedPrefix:
    """What `shared_prefix` gives: a context in which a model attends to a prefix. It can be entered once."""

    def __init__(
        self,
        model: nn.Module,
        prefix: KVPrefix | int,
        attention: AttentionPath = "auto",
        window: WindowReading = "windowed",
        verify: bool = False,
    ) -> None:
        self.model = model
        self.unverified = prefix if verify and isinstance(prefix, KVPrefix) else None
        self.host = prefix_host(model, skip_unsupported=isinstance(prefix, int))
        self.num_tokens = prefix if isinstance(prefix, int) else prefix.num_tokens
        self._parts: list[LayerPrefix] = []
        if self.unverified is not None and any(
            not isinstance(layer.memory, CacheMemory) for layer in self.host.recurrent
        ):
            raise ValueError(
                f"`verify=True` compares with the prefix in transformers' cache, which {type(self.host.decoder).__name__} has not."
            )
        self._states: list[Mapping[str, Tensor]] = []
        self._holds_nothing = isinstance(prefix, int)
        if isinstance(prefix, KVPrefix):
            _check_prefix(prefix, self.host.layers)
            _check_states(prefix, self.host.recurrent)
            for recurrent_layer, state in zip(self.host.recurrent, prefix.states, strict=True):
                device = execution_device(recurrent_layer.module)
                self._states.append({name: tensor.to(device) for name, tensor in state.items()})
            for layer, key, value in zip(self.host.layers, prefix.keys, prefix.values, strict=True):
                device = execution_device(layer.module)
                self._parts.append(LayerPrefix(key.to(device), value.to(device), attention, window))
        self._state = "new"
        self._opener: FrameType | None = None
        self._home: tuple[int, Any] = (0, None)
        self.threads: set[int] = set()
        self._warned = False

    def __enter__(self) -> nn.Module:
        if self._state != "new":
            raise RuntimeError(
                f"This `shared_prefix(…)` context is {self._state}: call `shared_prefix` again for another."
            )
        # The one of now: a model whose cartridge was taken off since is prepared anew.
        self.host = prefix_host(self.model, skip_unsupported=self._holds_nothing)
        self._state = "open"
        self._opener, self._home = generator_that_opens(), thread_and_task()
        self.threads = set(sys._current_frames())  # that were there before
        self.host.open.append(self)
        self.host.count_context(1)
        OPEN.set((*(context for context in OPEN.get() if context in context.host.open), self))
        return self.model

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        if self._state != "open":
            return
        self._state, self._opener, self._home = "closed", None, (0, None)
        self.host.open.remove(self)
        self.host.count_context(-1)
        OPEN.set(tuple(context for context in OPEN.get() if context is not self))

    def holds_here(self) -> bool:
        """Whether the code that runs now is inside: a context that a generator opened holds while that one runs, in
        whatever thread it is asked for its next item.

        Raises:
            RuntimeError: a thread or task got the context of a generator, or of its caller, which look the same.
        """
        told = any(context is self for context in OPEN.get())
        if self._opener is None:
            return told
        if any(frame is self._opener for frame in frames()):
            return True
        if told and self._home != thread_and_task():
            raise RuntimeError(
                "`shared_prefix` was opened by a generator, and the model runs in another thread or task, which cannot "
                "tell whether the generator or its caller started it. Open `shared_prefix` in the function that the "
                "thread or task runs; without a prefix, run it in a `contextvars.Context()` of its own."
            )
        return False

    def warn_of_suspension(self) -> None:
        if self._opener is None or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"A model runs without the prefix that the generator `{self._opener.f_code.co_name}` opened: it holds inside of "
            "the generator alone. If it is for the generator's caller, make it a context manager "
            "(`contextlib.contextmanager`).",
            RuntimeWarning,
            stacklevel=2,
        )

    def parts(self, layer: int, module: nn.Module, query: Tensor) -> Sequence[LayerPrefix]:
        if not self._parts or not self.num_tokens:
            return ()
        part = self._parts[layer]
        key, value = (tensor.to(query.device, query.dtype) for tensor in (part.key, part.value))
        if self.host.layers[layer].expands:
            key, value = expand_tokens(module, key, value)
        return (LayerPrefix(key, value, part.path, part.window),)

    def state(self, layer: int, module: nn.Module) -> Mapping[str, Tensor] | None:
        return self._states[layer] if self._states else None


def shared_prefix(
    model: nn.Module,
    prefix: KVPrefix,
    *,
    attention: AttentionPath = "auto",
    sliding_window: WindowReading = "windowed",
    verify: bool = False,
) -> SharedPrefix:
    """Makes every row of every batch attend to `prefix`, in `forward` and `generate`, without copying it per row.

    The result is that of passing the prefix as `past_key_values` to every row (`KVPrefix.to_cache`), with positions
    and padding taken care of: positions come from `position_ids`, or from attention mask and cache. Contexts nest, in
    any order of closing: each adds its prefix, and inside an active cartridge they add to the cartridge. Recurrent layers
    begin from the prefix's state, each row behind its own padding; they begin from one, so two prefixes with states do not
    nest.

    It holds for the code inside the `with`, and for no other: threads and async tasks each have their own, and a
    generator's is not its caller's. A thread that is started inside has to be told:
    `Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=…)`.

    Args:
        model: A transformers causal LM, or a PEFT model around one.
        prefix: Keys, values and states made by the same model; see `KVPrefix.from_text`.
        attention: `auto` (fast), `merged` or `concatenated` (the plain reference, for debugging).
        sliding_window: In sliding-window layers, whether prefix tokens leave the window as any token does (`windowed`,
            as `past_key_values` would) or stay in sight (`pinned`).
        verify: Whether the first forward is computed once more with the prefix as `past_key_values` of every row, and the
            final hidden states are held against those.

    ```python
    prefix = KVPrefix.from_text(model, tokenizer, document)
    with shared_prefix(model, prefix):
        model.generate(**tokenizer(questions, padding=True, return_tensors="pt"))
    ```

    Raises:
        ValueError: `prefix` was made by a model of another shape.
        UnsupportedModelError: the model has layers that cannot hold a prefix.
            In a forward, with `verify`: the results differ.
        RuntimeError: in a forward, if a layer did not attend to the prefix.
    """
    if verify and sliding_window != "windowed":
        raise ValueError('`verify=True` compares with `past_key_values`, which only the reading "windowed" is like.')
    return SharedPrefix(model, prefix, attention, sliding_window, verify)


def positions_from(model: nn.Module, position: int) -> SharedPrefix:
    """A context in which the model's first token stands at `position`, with nothing in front of it."""
    return SharedPrefix(model, position)


def _check_prefix(prefix: KVPrefix, layers: Sequence[AttentionLayer]) -> None:
    have = [(key.shape[0], key.shape[2], value.shape[2]) for key, value in zip(prefix.keys, prefix.values, strict=True)]
    want = [layer.shape for layer in layers]
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


def _check_states(prefix: KVPrefix, layers: Sequence[RecurrentLayer]) -> None:
    if len(prefix.states) != len(layers):
        raise ValueError(
            f"`prefix` has the states of {len(prefix.states)} recurrent layers, the model has {len(layers)}: it was made by "
            "another model, or without its states."
        )
    for layer, state in zip(layers, prefix.states, strict=True):
        have = {name: tuple(tensor.shape) for name, tensor in state.items()}
        want = {name: kept.shape for name, kept in layer.states.items()}
        if have != want:
            raise ValueError(f"`prefix` was made by another model: it has the state {have}, `{layer.name}` has {want}.")
