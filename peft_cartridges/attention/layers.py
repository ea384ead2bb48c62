"""Finding the attention layers of a model that can hold a prefix, and their shapes: from the model, not from a list.

Since transformers 5 every decoder's attention module calls a function that it looks up in `ALL_ATTENTION_FUNCTIONS`;
that look-up is where a prefix comes in, and what a module is recognized by.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

_CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")

# Attention that does more with the keys and values of a cache than attend to them, by what its modules carry.
_MORE_THAN_ATTENTION = {
    "indexer": "an indexer picks the keys that are seen, and it has none for a prefix",
    "compressor": "it also attends to compressed keys, and it has none for a prefix",
    "A": "its mask is computed from the values, and a prefix would have none",
    "lambda_q1": "its values are rearranged between the cache and the attention",
}


class UnsupportedModelError(ValueError):
    """The model, or a layer of it, cannot hold a prefix; the message names the module and the reason."""


@dataclass(frozen=True)
class AttentionLayer:
    """An attention module that can hold a prefix.

    Args:
        name: Its qualified name in the model.
        module: The module itself.
        layer_idx: Its number among the model's layers, as the module and caches know it.
        num_key_value_heads, key_dim, value_dim: The shape of what it caches for one token.
        readers: Names and modules of later layers that have no keys and values of their own and attend to this
            layer's (Gemma 3n, Gemma 4), and so to its prefix.
    """

    name: str
    module: Any
    layer_idx: int
    num_key_value_heads: int
    key_dim: int
    value_dim: int
    readers: tuple[tuple[str, Any], ...] = ()


def find_attention_layers(model: nn.Module, *, skip_unsupported: bool = False) -> list[AttentionLayer]:
    """The attention layers of a decoder that keep keys and values of their own, ordered by layer index.

    Args:
        model: A transformers causal LM, or a PEFT model around one.
        skip_unsupported: Leave out layers without attention (linear attention, convolutions) instead of refusing them.

    Raises:
        UnsupportedModelError: the model is no decoder, or a layer of it has no attention that can hold a prefix.
    """
    config = get_text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"`model` is an encoder–decoder ({type(model).__name__}): a prefix of keys and values stands in front of a "
            "decoder-only language model's tokens. Use a causal LM (`AutoModelForCausalLM`)."
        )
    modules: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if _can_hold_prefix(module)
    ]
    modules.sort(key=lambda named: named[1].layer_idx)
    readers = [named for named in modules if getattr(named[1], "is_kv_shared_layer", False)]
    layers = [
        AttentionLayer(name, module, module.layer_idx, *_cached_shape(name, module), _readers_of(module, readers))
        for name, module in modules
        if not getattr(module, "is_kv_shared_layer", False)
    ]
    _refuse_unsupported(model, config, layers, skip_unsupported)
    return layers


def find_decoder(model: nn.Module, layers: Iterable[AttentionLayer]) -> tuple[str, nn.Module]:
    """Name and module of the innermost model around all attention layers: the one that is given `position_ids`.

    Raises:
        UnsupportedModelError: no module around the layers takes `position_ids`.
    """
    names = [layer.name for layer in layers]
    around = [
        (name, module)
        for name, module in model.named_modules()
        if all(layer.startswith(f"{name}." if name else "") for layer in names)
        and "position_ids" in inspect.signature(module.forward).parameters
    ]
    if not around:
        raise UnsupportedModelError(
            f"No module of {type(model).__name__} around its attention layers takes `position_ids`, which a prefix has "
            "to shift (models with ALiBi or other relative biases are not supported)."
        )
    return max(around, key=lambda named: named[0].count(".") + bool(named[0]))


def get_text_config(model: nn.Module) -> Any:
    """The configuration of the language model (of the text part, in a vision–language model).

    Raises:
        UnsupportedModelError: `model` is not a transformers model.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"`model` is a {type(model).__name__} without a transformers configuration: pass a transformers causal LM."
        )
    return config.get_text_config(decoder=True)


def execution_device(module: nn.Module) -> torch.device:
    """Where `module` computes: also where accelerate keeps its weights elsewhere (offloaded, then on `meta`)."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    devices = (tensor.device for tensor in (*module.parameters(), *module.buffers()))
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


@cache
def _uses_attention_interface(module_class: Any) -> bool:
    forward = inspect.unwrap(module_class.forward)
    parameters = inspect.signature(forward).parameters
    return (
        "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())
        and any(name in parameters for name in _CACHE_ARGUMENTS)
        and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    )


def _can_hold_prefix(module: nn.Module) -> bool:
    return (
        _uses_attention_interface(type(module))  # type: ignore[arg-type] # classes are hashable
        and isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "is_causal", True)
        and not getattr(module, "is_cross_attention", False)
    )


def _readers_of(module: Any, readers: list[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    if not getattr(module, "store_full_length_kv", False):
        return ()
    return tuple(named for named in readers if named[1].layer_type == module.layer_type)


def _cached_shape(name: str, module: Any) -> tuple[int, int, int]:
    """(num_key_value_heads, key_dim, value_dim) of what `module` puts into a cache for one token."""
    config: Any = module.config
    if (per_layer := getattr(config, "per_layer_config", None)) is not None:
        config = per_layer[module.layer_idx]
    if hasattr(module, "expand_kv"):  # latent attention caches what all heads share, compressed
        return 1, module.kv_lora_rank, module.qk_rope_head_dim
    if hasattr(module, "qk_head_dim") and hasattr(module, "v_head_dim"):  # or, in older versions, what it expands
        return config.num_attention_heads, module.qk_head_dim, module.v_head_dim
    head_dim = (
        getattr(module, "head_dim", None) or getattr(module, "head_size", None) or getattr(config, "head_dim", None)
    )
    # The projection knows best: configurations may carry fields that their models ignore.
    width = getattr(getattr(module, "k_proj", None), "out_features", None)
    heads = width // head_dim if width and head_dim else None
    heads = heads or next(
        filter(None, (getattr(module, key, None) for key in ("num_key_value_heads", "kv_heads"))), None
    )
    heads = heads or getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if not heads or not head_dim:
        raise UnsupportedModelError(
            f"`{name}` ({type(module).__name__}) does not tell its key/value heads and head_dim."
        )
    return heads, head_dim, getattr(module, "v_head_dim", None) or head_dim


def _refuse_unsupported(
    model: nn.Module, config: Any, layers: list[AttentionLayer], skip_unsupported: bool = False
) -> None:
    found = sorted(
        [layer.layer_idx for layer in layers] + [module.layer_idx for layer in layers for _, module in layer.readers]
    )
    expected = list(range(config.num_hidden_layers))
    types = getattr(config, "layer_types", None) or []
    if "chunked_attention" in types:
        raise UnsupportedModelError(
            f"{type(model).__name__} has chunked-attention layers (layer {types.index('chunked_attention')}), where "
            "tokens of a later chunk never see an earlier one: a prefix has no meaning there."
        )
    for layer in layers:
        for attribute, reason in _MORE_THAN_ATTENTION.items():
            if getattr(layer.module, attribute, None) is not None:
                raise UnsupportedModelError(
                    f"`{layer.name}` ({type(layer.module).__name__}) cannot hold a prefix: {reason}."
                )
    if "hybrid" in {kind.removesuffix("_sliding") for kind in types} and not skip_unsupported:
        raise UnsupportedModelError(
            f"{type(model).__name__} has layers with a recurrent state beside their attention (layer types: "
            f"{', '.join(sorted(set(types)))}), which a prefix of keys and values does not hold. "
            "`CartridgeConfig(skip_unsupported_layers=True)` puts a cartridge into the attention only."
        )
    if found == expected or (skip_unsupported and layers and set(found) < set(expected)):
        _refuse_untold_window(model, config, layers)
        return
    missing = sorted(set(expected) - set(found))
    if not missing:
        raise UnsupportedModelError(
            f"{type(model).__name__} has several attention modules with one layer index "
            f"({', '.join(layer.name for layer in layers[:4])}, …): it is not one decoder."
        )
    prefix_of_layers = _layer_list_name(model, len(expected))
    names = [f"{prefix_of_layers}.{index}" for index in missing] if prefix_of_layers else [str(i) for i in missing]
    kinds = sorted({types[index] for index in missing if index < len(types)})
    raise UnsupportedModelError(
        f"{type(model).__name__}: the layers {', '.join(names[:8])}{', …' if len(names) > 8 else ''} have no causal "
        "attention through transformers' attention interface"
        + (f" (layer types: {', '.join(kinds)})" if kinds else "")
        + ", so they cannot hold a prefix of keys and values."
        + (" `CartridgeConfig(skip_unsupported_layers=True)` leaves them out." if layers else "")
    )


def _refuse_untold_window(model: nn.Module, config: Any, layers: list[AttentionLayer]) -> None:
    """A window that a model puts into its masks but does not tell its attention function would not bind a prefix."""
    if not getattr(config, "sliding_window", None) or getattr(config, "layer_types", None):
        return
    attention = inspect.unwrap(type(layers[0].module).forward).__code__
    decoder = inspect.unwrap(type(find_decoder(model, layers)[1]).forward).__code__
    tells = "sliding_window" in (*attention.co_names, *attention.co_consts)
    if "create_sliding_window_causal_mask" in decoder.co_names and not tells:
        raise UnsupportedModelError(
            f"`{layers[0].name}` ({type(layers[0].module).__name__}) does not tell its sliding window "
            f"({config.sliding_window}) to its attention function. If your texts are shorter than that, set "
            "`model.config.sliding_window = None`."
        )


def _layer_list_name(model: nn.Module, num_layers: int) -> str | None:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name
    return None
