"""How a cartridge lies in `adapter_model.safetensors`, and the checks before anything from there touches a model.

Layers of one shape: stock PEFT's single tensor `prompt_embeddings` `[num_tokens, num_layers * 2 * token_dim]`.
Otherwise (the configuration then has `layer_shapes`): `layers.{i}.key` and `layers.{i}.value`, as in `KVPrefix`, for
every layer `i` of the model that holds a part of the cartridge. With `quantization` in the configuration, each of the
latter as `quantization.py` quantizes it, also where the layers are of one shape.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..kv_prefix import KVPrefix
from .config import CartridgeConfig
from .quantization import SUFFIXES, dequantize_tensors, quantize_tensors

PROMPT_EMBEDDINGS = "prompt_embeddings"


def prefix_to_tensors(prefix: KVPrefix, config: CartridgeConfig) -> dict[str, Tensor]:
    """The tensors of the adapter file."""
    if config.layer_shapes is None and config.quantization is None:
        return {PROMPT_EMBEDDINGS: prefix.to_prompt_embeddings()}
    tensors: dict[str, Tensor] = {}
    for index, key, value in zip(_shapes_by_layer(config), prefix.keys, prefix.values, strict=True):
        tensors |= {f"layers.{index}.key": key, f"layers.{index}.value": value}
    return tensors if config.quantization is None else quantize_tensors(tensors, config.quantization)


def tensors_to_prefix(tensors: Mapping[str, Tensor], config: CartridgeConfig) -> KVPrefix:
    """The prefix in an adapter file.

    Raises:
        ValueError: a tensor is missing, has another shape than the configuration says, or is not finite; the message
            says which and why.
    """
    if config.layer_shapes is None and config.quantization is None:
        assert config.num_layers is not None and config.num_attention_heads is not None
        flat = _checked(
            tensors, PROMPT_EMBEDDINGS, (config.num_tokens, config.num_layers * 2 * (config.token_dim or 0))
        )
        return KVPrefix.from_prompt_embeddings(flat, num_layers=config.num_layers, num_heads=config.num_attention_heads)
    shapes: dict[str, tuple[int, int, int]] = {}
    for index, (heads, key_dim, value_dim) in _shapes_by_layer(config).items():
        shapes[f"layers.{index}.key"] = (heads, config.num_tokens or 0, key_dim)
        shapes[f"layers.{index}.value"] = (heads, config.num_tokens or 0, value_dim)
    if config.quantization is not None:
        tensors = dequantize_tensors(tensors, config.quantization, shapes)
    keys_and_values = [_checked(tensors, name, shape) for name, shape in shapes.items()]
    return KVPrefix(tuple(keys_and_values[0::2]), tuple(keys_and_values[1::2]))


def is_cartridge_tensor(name: str) -> bool:
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name == PROMPT_EMBEDDINGS or (name.startswith("layers.") and name.endswith((".key", ".value")))


def _shapes_by_layer(config: CartridgeConfig) -> dict[int, tuple[int, int, int]]:
    """(num_key_value_heads, key_dim, value_dim) of each layer that holds a part of the cartridge, by its index."""
    if config.layer_shapes is not None:
        return {index: (s[0], s[1], s[2]) for index, s in enumerate(config.layer_shapes) if s is not None}
    assert config.num_layers is not None and config.num_attention_heads is not None and config.token_dim is not None
    dim = config.token_dim // config.num_attention_heads
    return dict.fromkeys(range(config.num_layers), (config.num_attention_heads, dim, dim))


def _checked(tensors: Mapping[str, Tensor], name: str, shape: tuple[int | None, ...]) -> Tensor:
    if name not in tensors:
        raise ValueError(
            f"The adapter file has no tensor `{name}` (it has {', '.join(sorted(tensors)[:5]) or 'none'}): it is no "
            "cartridge, or its adapter_config.json belongs to another file."
        )
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"Tensor `{name}` of the adapter file has shape {tuple(tensor.shape)}, but adapter_config.json and the "
            f"base model ask for {shape}: the files do not belong together, or the cartridge to another base model."
        )
    if not tensor.is_floating_point():
        raise ValueError(
            f"Tensor `{name}` of the adapter file has dtype {tensor.dtype}, expected a floating-point one."
        )
    if not torch.isfinite(tensor).all():
        raise ValueError(f"Tensor `{name}` of the adapter file holds NaN or infinite values: the file is damaged.")
    return tensor
