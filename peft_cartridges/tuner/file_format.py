"""How a cartridge lies in `adapter_model.safetensors`, and the checks before anything from there touches a model.

Layers of one shape: stock PEFT's single tensor `prompt_embeddings` `[num_tokens, num_layers * 2 * token_dim]`.
Otherwise (the configuration then has `layer_shapes`): `layers.{i}.key` and `layers.{i}.value`, as in `KVPrefix`, for
every layer `i` of the model that holds a part of the cartridge.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..kv_prefix import KVPrefix
from .config import CartridgeConfig

PROMPT_EMBEDDINGS = "prompt_embeddings"


def prefix_to_tensors(prefix: KVPrefix, config: CartridgeConfig) -> dict[str, Tensor]:
    """The tensors of the adapter file."""
    if config.layer_shapes is None:
        return {PROMPT_EMBEDDINGS: prefix.to_prompt_embeddings()}
    tensors: dict[str, Tensor] = {}
    held = [index for index, shape in enumerate(config.layer_shapes) if shape is not None]
    for index, key, value in zip(held, prefix.keys, prefix.values, strict=True):
        tensors |= {f"layers.{index}.key": key, f"layers.{index}.value": value}
    return tensors


def tensors_to_prefix(tensors: Mapping[str, Tensor], config: CartridgeConfig) -> KVPrefix:
    """The prefix in an adapter file.

    Raises:
        ValueError: a tensor is missing, has another shape than the configuration says, or is not finite; the message
            says which and why.
    """
    if config.layer_shapes is None:
        assert config.num_layers is not None and config.num_attention_heads is not None
        flat = _checked(
            tensors, PROMPT_EMBEDDINGS, (config.num_tokens, config.num_layers * 2 * (config.token_dim or 0))
        )
        return KVPrefix.from_prompt_embeddings(flat, num_layers=config.num_layers, num_heads=config.num_attention_heads)
    keys, values = [], []
    for index, shape in enumerate(config.layer_shapes):
        if shape is not None:
            heads, key_dim, value_dim = shape
            keys.append(_checked(tensors, f"layers.{index}.key", (heads, config.num_tokens, key_dim)))
            values.append(_checked(tensors, f"layers.{index}.value", (heads, config.num_tokens, value_dim)))
    return KVPrefix(tuple(keys), tuple(values))


def is_cartridge_tensor(name: str) -> bool:
    return name == PROMPT_EMBEDDINGS or (name.startswith("layers.") and name.endswith((".key", ".value")))


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
