"""How a cartridge lies in `adapter_model.safetensors`, and the checks before anything from there touches a model.

Layers of one shape: stock PEFT's single tensor `prompt_embeddings` `[num_tokens, num_layers * 2 * token_dim]`.
Otherwise (the configuration then has `layer_shapes`): `layers.{i}.key` and `layers.{i}.value`, as in `KVPrefix`, for
every layer `i` of the model that holds a part of the cartridge, and `layers.{i}.state.{part}` for every part of the state
that a recurrent layer begins from. With `quantization` in the configuration, keys and values as `quantization.py`
quantizes them, also where the layers are of one shape; states are small, and whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kv_prefix import KVPrefix
from .quantization import SUFFIXES, dequantize_tensors, quantize_tensors, quantized_forms

if TYPE_CHECKING:
    from .config import CartridgeConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
PROMPT_EMBEDDINGS = "prompt_embeddings"

# Dtypes by their names in a safetensors header.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Whole numbers are no keys or values, and 8-bit floats need scales that no one wrote.
_WHOLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TensorForm(NamedTuple):
    """A tensor as a configuration asks for it: its shape, and the dtypes that it may have."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


def prefix_to_tensors(prefix: KVPrefix, config: CartridgeConfig) -> dict[str, Tensor]:
    """The tensors of the adapter file."""
    if config.layer_shapes is None and config.quantization is None:
        return {PROMPT_EMBEDDINGS: prefix.to_prompt_embeddings()}
    tensors: dict[str, Tensor] = {}
    for (index, _), key, value in zip(_held_layers(config), prefix.keys, prefix.values, strict=True):
        tensors |= {f"layers.{index}.key": key, f"layers.{index}.value": value}
    if config.quantization is not None:
        tensors = quantize_tensors(tensors, config.quantization)
    for (index, _), state in zip(_held_states(config), prefix.states, strict=True):
        tensors |= {f"layers.{index}.state.{part}": tensor for part, tensor in state.items()}
    return tensors


def tensors_to_prefix(tensors: Mapping[str, Tensor], config: CartridgeConfig) -> KVPrefix:
    """The prefix in an adapter file; of quantized tensors, in float32.

    Raises:
        ValueError: a tensor is missing, has another shape or dtype than the configuration says, is not finite, or is no
            part of a cartridge; the message says which and why.
    """
    names = check_tensors({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}, config)
    named = {name: tensors[name] for name in names}
    if config.quantization is not None:
        states = {name: named[name] for name, _ in _states(config)}
        named = {**dequantize_tensors(named, config.quantization, dict(_keys_and_values(config))), **states}
    for name, tensor in named.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"Tensor `{name}` of the adapter file holds NaN or infinite values: the file is damaged.")
    if config.layer_shapes is None and config.quantization is None:
        assert config.num_layers is not None and config.num_attention_heads is not None
        flat = named[PROMPT_EMBEDDINGS]
        return KVPrefix.from_prompt_embeddings(flat, num_layers=config.num_layers, num_heads=config.num_attention_heads)
    keys = tuple(named[f"layers.{index}.key"] for index, _ in _held_layers(config))
    values = tuple(named[f"layers.{index}.value"] for index, _ in _held_layers(config))
    parts = [{part: named[f"layers.{index}.state.{part}"] for part in shapes} for index, shapes in _held_states(config)]
    return KVPrefix(keys, values, tuple(parts), config.num_tokens or 0)


def expected_tensors(config: CartridgeConfig) -> Iterator[tuple[str, TensorForm]]:
    """Names and forms of the cartridge's tensors, each layer's key before its value, then states. One after another: how many there
    are is a number in a file, which may say anything."""
    if config.layer_shapes is None and config.quantization is None:
        columns = (config.num_layers or 0) * 2 * (config.token_dim or 0)
        yield PROMPT_EMBEDDINGS, TensorForm((config.num_tokens or 0, columns), _WHOLE)
        return
    for name, shape in _keys_and_values(config):
        if config.quantization is None:
            yield name, TensorForm(shape, _WHOLE)
        else:
            for part, (part_shape, dtype) in quantized_forms(name, shape, config.quantization).items():
                yield part, TensorForm(part_shape, (dtype,))
    for name, state_shape in _states(config):
        yield name, TensorForm(state_shape, _WHOLE)


def check_tensors(found: Mapping[str, tuple[tuple[int, ...], Any]], config: CartridgeConfig) -> list[str]:
    """Holds names, shapes and dtypes of a file's tensors against the configuration.

    Returns:
        The names of the cartridge's tensors, in the order of `expected_tensors`.

    Raises:
        ValueError: one is missing, of another shape or dtype, or neither a cartridge's nor of `modules_to_save`.
    """
    names = []
    for name, form in expected_tensors(config):
        if name not in found:
            raise ValueError(
                f"The adapter file has no tensor `{name}` (it has {', '.join(sorted(found)[:5]) or 'none'}): it is no "
                "cartridge, or its adapter_config.json belongs to another file."
            )
        shape, dtype = found[name]
        if shape != form.shape:
            raise ValueError(
                f"Tensor `{name}` of the adapter file has shape {shape}, but adapter_config.json and the "
                f"base model ask for {form.shape}: the files do not belong together, or the cartridge to another base "
                "model."
            )
        if dtype not in form.dtypes:
            raise ValueError(
                f"Tensor `{name}` has dtype {_NAMES.get(dtype, dtype)}, expected one of "
                f"{', '.join(_NAMES[allowed] for allowed in form.dtypes)}."
            )
        names.append(name)
    expected, modules = set(names), config.modules_to_save or ()
    for name in found:
        if name not in expected and not any(f".{module}." in f".{name}" for module in modules):
            raise ValueError(
                f"The adapter file has a tensor `{name}` that is no part of a cartridge and of no module in "
                f"`modules_to_save` ({', '.join(modules) or 'none'}): it is refused."
            )
    return names


def is_cartridge_tensor(name: str) -> bool:
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name == PROMPT_EMBEDDINGS or re.fullmatch(r"layers\.\d+\.(key|value|state\.\w+)", name) is not None


def read_prefix(path: Path, config: CartridgeConfig) -> KVPrefix:
    """Keys, values and states in an adapter file, on the CPU and in the file's dtype (of a quantized one, in float32). Names,
    shapes and dtypes are checked in the file's header, before memory is taken for any of them.

    Raises:
        ValueError: the file is truncated, or has tensors of another name, shape or dtype than the configuration says,
            or values that are not finite.
    """
    try:
        config.check_shape()
        with safe_open(path, framework="pt", device="cpu") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {
                name: (tuple(part.get_shape()), _DTYPES.get(dtype := part.get_dtype(), dtype))
                for name, part in slices.items()
            }
            names = check_tensors(found, config)
            return tensors_to_prefix({name: file.get_tensor(name) for name in names}, config)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): get it again.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def missing_weights(where: Any, names: Iterable[str]) -> Exception:
    """The error for a place with a configuration but no safetensors weights."""
    if pickled := sorted(set(names) & set(PICKLED_FILES)):
        return ValueError(
            f"{where} has pickled weights only ({', '.join(pickled)}), which can run code when they are loaded: they "
            f"are refused. Ask its author to save it again as {WEIGHTS_FILE} (`save_pretrained` does)."
        )
    return FileNotFoundError(f"{where} is no complete cartridge: it has no {WEIGHTS_FILE}.")


def _keys_and_values(config: CartridgeConfig) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Names and shapes of keys and values by layer, before they are quantized."""
    tokens = config.num_tokens or 0
    for index, (heads, key_dim, value_dim) in _held_layers(config):
        yield f"layers.{index}.key", (heads, tokens, key_dim)
        yield f"layers.{index}.value", (heads, tokens, value_dim)


def _held_layers(config: CartridgeConfig) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """Indices of the layers that hold keys and values, and their (num_key_value_heads, key_dim, value_dim)."""
    if config.layer_shapes is not None:
        yield from ((index, (s[0], s[1], s[2])) for index, s in enumerate(config.layer_shapes) if s is not None)
        return
    assert config.num_layers is not None and config.num_attention_heads is not None and config.token_dim is not None
    dim = config.token_dim // config.num_attention_heads
    for index in range(config.num_layers):
        yield index, (config.num_attention_heads, dim, dim)


def _states(config: CartridgeConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the states' parts."""
    for index, shapes in _held_states(config):
        yield from ((f"layers.{index}.state.{part}", tuple(shape)) for part, shape in shapes.items())


def _held_states(config: CartridgeConfig) -> Iterator[tuple[int, dict[str, list[int]]]]:
    """Indices of the layers that hold a state, and the shapes of its parts."""
    yield from ((index, shapes) for index, shapes in enumerate(config.layer_states or ()) if shapes is not None)
