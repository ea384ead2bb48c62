"""The folder of a saved cartridge: read with every check before a value is used, written so that no half is ever seen.

Only `adapter_config.json` and `adapter_model.safetensors` are opened. Nothing in a folder is executed or unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils import PeftType
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .kv_prefix import KVPrefix
from .tuner.config import CartridgeConfig
from .tuner.file_format import is_cartridge_tensor, prefix_to_tensors, tensors_to_prefix

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")

_MAX_CONFIG_BYTES = 1 << 20
# Names in a safetensors header. Whole numbers are no keys or values, and 8-bit floats need scales that no one wrote.
_DTYPES = ("F64", "F32", "F16", "BF16")
_QUANTIZED_DTYPES = ("I8", "U8", "F8_E4M3", "F16", "BF16")


def read_config(folder: str | Path) -> CartridgeConfig:
    """The configuration of the cartridge in `folder`.

    Raises:
        FileNotFoundError: there is no such folder, or no `adapter_config.json` in it.
        ValueError: the file is damaged, belongs to another kind of adapter, or lacks the cartridge's shape.
    """
    path = Path(folder) / CONFIG_FILE
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no cartridge: it has no {CONFIG_FILE}.")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes: it is no adapter configuration.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): the file is damaged, get it again.") from error
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    if kind != PeftType.CARTRIDGE.value:
        raise ValueError(f"{folder} is no cartridge: its {CONFIG_FILE} says peft_type {kind!r}, not 'CARTRIDGE'.")
    known = {field.name for field in dataclasses.fields(CartridgeConfig)}
    if unknown := sorted(set(fields) - known):
        warnings.warn(
            f"{path} has fields that this version does not know and leaves out: {', '.join(unknown)}.", stacklevel=2
        )
    try:
        config = CartridgeConfig(**{name: value for name, value in fields.items() if name in known})
        _check_shape(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def read_cartridge(folder: str | Path) -> tuple[CartridgeConfig, KVPrefix]:
    """Configuration, and keys and values of the cartridge in `folder`, on the CPU and in the file's dtype.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing.
        ValueError: the folder holds another kind of adapter, only pickled weights, a truncated file, or tensors of
            another name, shape or dtype than the configuration says, or values that are not finite.
    """
    config = read_config(folder)
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise missing_weights(str(folder), [name.name for name in Path(folder).iterdir()])
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_header(path, config, {name: file.get_slice(name).get_dtype() for name in file.keys()})  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in file.keys() if is_cartridge_tensor(name)}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): get it again.") from error
    try:
        return config, tensors_to_prefix(tensors, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_cartridge(folder: str | Path, config: CartridgeConfig, prefix: KVPrefix) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` as `save_pretrained` does. Each is renamed into
    place when it is complete, the weights first."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".cartridge-", dir=folder) as staging:
        tensors = {name: tensor.contiguous() for name, tensor in prefix_to_tensors(prefix.detach(), config).items()}
        save_file(tensors, Path(staging) / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(staging)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(Path(staging) / name, folder / name)


def quantize_cartridge(
    source: str | Path, output_dir: str | Path, quantization: Literal["int8", "int4", "fp8", "none"]
) -> tuple[int, int]:
    """Writes a cartridge anew, in fewer bytes.

    Args:
        source: Its folder.
        output_dir: Another folder, for `adapter_config.json` and `adapter_model.safetensors`. Any other file that lies
            beside the cartridge's (a card, a tokenizer) is copied.
        quantization: `int8`, `int4` or `fp8`; or `none`, which restores stock PEFT's format, in bfloat16.

    Returns:
        Bytes of the weights before and after.

    Raises:
        FileNotFoundError: there is no cartridge in `source`.
        FileExistsError: `output_dir` is `source`, or holds a cartridge.
        ValueError: the cartridge is damaged, has further trained modules, or there is no such quantization.
        ImportError: torchao is not installed, which `int8` and `int4` need.
    """
    source, output_dir = Path(source), Path(output_dir)
    config, prefix = read_cartridge(source)
    if config.modules_to_save:
        raise ValueError(f"{source} has `modules_to_save` beside its keys and values, which are not quantized.")
    if (output_dir / CONFIG_FILE).exists():
        raise FileExistsError(f"{output_dir} holds a cartridge already: give another `output_dir`.")
    config = dataclasses.replace(config, quantization=None if quantization == "none" else quantization)
    write_cartridge(output_dir, config, prefix.to(torch.bfloat16) if quantization == "none" else prefix)
    for file in source.iterdir():
        if file.is_file() and file.name not in (CONFIG_FILE, WEIGHTS_FILE, *PICKLED_FILES):
            shutil.copy2(file, output_dir / file.name)
    before, after = ((folder / WEIGHTS_FILE).stat().st_size for folder in (source, output_dir))
    return before, after


def missing_weights(where: str, names: list[str]) -> Exception:
    """The error for a place with a configuration but no safetensors weights."""
    if pickled := sorted(set(names) & set(PICKLED_FILES)):
        return ValueError(
            f"{where} has pickled weights only ({', '.join(pickled)}), which can run code when they are loaded: they "
            f"are refused. Ask its author to save it again as {WEIGHTS_FILE} (`save_pretrained` does)."
        )
    return FileNotFoundError(f"{where} is no complete cartridge: it has no {WEIGHTS_FILE}.")


def _check_shape(config: CartridgeConfig) -> None:
    if config.layer_shapes is None:
        needed: dict[str, Any] = {
            name: getattr(config, name) for name in ("num_layers", "num_attention_heads", "token_dim")
        }
        for name, value in needed.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        if config.token_dim % config.num_attention_heads:  # type: ignore[operator]
            raise ValueError(f"`token_dim` ({config.token_dim}) is no multiple of `num_attention_heads`.")
        return
    shapes = config.layer_shapes
    held = [shape for shape in shapes if shape is not None] if isinstance(shapes, list) else []
    sizes = [size for shape in held for size in (shape if isinstance(shape, list) and len(shape) == 3 else [0])]
    if not held or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError("`layer_shapes` must be a list of [num_key_value_heads, key_dim, value_dim].")


def _check_header(path: Path, config: CartridgeConfig, dtypes: dict[str, str]) -> None:
    """Names and dtypes, before any tensor is read. The shapes are checked with the values, by `tensors_to_prefix`."""
    for name, dtype in dtypes.items():
        if not is_cartridge_tensor(name) and not config.modules_to_save:
            raise ValueError(
                f"{path} has a tensor `{name}` that is no part of a cartridge, and its {CONFIG_FILE} names no "
                "`modules_to_save`: it is refused."
            )
        allowed = _DTYPES if config.quantization is None else _QUANTIZED_DTYPES
        if is_cartridge_tensor(name) and dtype not in allowed:
            raise ValueError(f"{path}: tensor `{name}` has dtype {dtype}, expected one of {', '.join(allowed)}.")
