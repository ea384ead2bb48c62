"""How a cartridge lies in `adapter_model.safetensors`, and the checks before anything from there touches a model.

Layers of one shape: stock PEFT's single tensor `prompt_embeddings` `[num_tokens, num_layers * 2 * token_dim]`.
Otherwise (the configuration then has `layer_shapes`): `layers.{i}.key` and `layers.{i}.value`, as in `KVPrefix`, for
every layer `i` of the model that holds a part of the cartridge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kv_prefix import KVPrefix

if TYPE_CHECKING:
    from .config import CartridgeConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PROMPT_EMBEDDINGS = "prompt_embeddings"

_PICKLED_FILES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
# Names in a safetensors header. Whole numbers are no keys or values, and 8-bit floats need scales that no one wrote.
_DTYPES = ("F64", "F32", "F16", "BF16")


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
        ValueError: a tensor is missing, has another shape than the configuration says, is not finite, or is no part of
            a cartridge; the message says which and why.
    """
    check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config)
    named = {name: tensors[name] for name in expected_shapes(config)}
    for name, tensor in named.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"Tensor `{name}` of the adapter file has dtype {tensor.dtype}, expected a floating-point one."
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"Tensor `{name}` of the adapter file holds NaN or infinite values: the file is damaged.")
    if config.layer_shapes is None:
        assert config.num_layers is not None and config.num_attention_heads is not None
        flat = named[PROMPT_EMBEDDINGS]
        return KVPrefix.from_prompt_embeddings(flat, num_layers=config.num_layers, num_heads=config.num_attention_heads)
    in_order = tuple(named.values())
    return KVPrefix(in_order[0::2], in_order[1::2])


def expected_shapes(config: CartridgeConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the cartridge's tensors, each layer's key before its value."""
    tokens = config.num_tokens or 0
    if config.layer_shapes is None:
        return {PROMPT_EMBEDDINGS: (tokens, (config.num_layers or 0) * 2 * (config.token_dim or 0))}
    shapes: dict[str, tuple[int, ...]] = {}
    for index, shape in enumerate(config.layer_shapes):
        if shape is not None:
            heads, key_dim, value_dim = shape
            shapes[f"layers.{index}.key"] = (heads, tokens, key_dim)
            shapes[f"layers.{index}.value"] = (heads, tokens, value_dim)
    return shapes


def check_shapes(found: Mapping[str, tuple[int, ...]], config: CartridgeConfig) -> None:
    """Holds names and shapes of a file's tensors against the configuration.

    Raises:
        ValueError: one is missing, of another shape, or neither a cartridge's nor of `modules_to_save`.
    """
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(
                f"The adapter file has no tensor `{name}` (it has {', '.join(sorted(found)[:5]) or 'none'}): it is no "
                "cartridge, or its adapter_config.json belongs to another file."
            )
        if found[name] != shape:
            raise ValueError(
                f"Tensor `{name}` of the adapter file has shape {found[name]}, but adapter_config.json and the "
                f"base model ask for {shape}: the files do not belong together, or the cartridge to another base model."
            )
    modules = config.modules_to_save or ()
    for name in found:
        if name not in expected and not any(f".{module}." in f".{name}" for module in modules):
            raise ValueError(
                f"The adapter file has a tensor `{name}` that is no part of a cartridge and of no module in "
                f"`modules_to_save` ({', '.join(modules) or 'none'}): it is refused."
            )


def is_cartridge_tensor(name: str) -> bool:
    return name == PROMPT_EMBEDDINGS or (name.startswith("layers.") and name.endswith((".key", ".value")))


def read_prefix(path: Path, config: CartridgeConfig) -> KVPrefix:
    """Keys and values in an adapter file, on the CPU and in the file's dtype. Names, shapes and dtypes are checked in
    the file's header, before memory is taken for any of them.

    Raises:
        ValueError: the file is truncated, or has tensors of another name, shape or dtype than the configuration says,
            or values that are not finite.
    """
    try:
        config.check_shape()
        with safe_open(path, framework="pt", device="cpu") as file:
            expected = expected_shapes(config)
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            check_shapes({name: tuple(part.get_shape()) for name, part in slices.items()}, config)
            for name, part in slices.items():
                if name in expected and (dtype := part.get_dtype()) not in _DTYPES:
                    raise ValueError(f"Tensor `{name}` has dtype {dtype}, expected one of {', '.join(_DTYPES)}.")
            return tensors_to_prefix({name: file.get_tensor(name) for name in expected}, config)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): get it again.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def missing_weights(where: Any, names: Iterable[str]) -> Exception:
    """The error for a place with a configuration but no safetensors weights."""
    if pickled := sorted(set(names) & set(_PICKLED_FILES)):
        return ValueError(
            f"{where} has pickled weights only ({', '.join(pickled)}), which can run code when they are loaded: they "
            f"are refused. Ask its author to save it again as {WEIGHTS_FILE} (`save_pretrained` does)."
        )
    return FileNotFoundError(f"{where} is no complete cartridge: it has no {WEIGHTS_FILE}.")
