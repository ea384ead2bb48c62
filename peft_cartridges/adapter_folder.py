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
from typing import Literal

import torch
from peft.utils import PeftType
from safetensors.torch import save_file

from .kv_prefix import KVPrefix
from .tuner.config import CartridgeConfig
from .tuner.file_format import (
    CONFIG_FILE,
    PICKLED_FILES,
    WEIGHTS_FILE,
    missing_weights,
    prefix_to_tensors,
    read_prefix,
)

_MAX_CONFIG_BYTES = 1 << 20


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
        config.check_shape()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def read_cartridge(folder: str | Path) -> tuple[CartridgeConfig, KVPrefix]:
    """Configuration, and keys, values and states of the cartridge in `folder`, on the CPU and in the file's dtype.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing.
        ValueError: the folder holds another kind of adapter, only pickled weights, a truncated file, or tensors of
            another name, shape or dtype than the configuration says, or values that are not finite.
    """
    config = read_config(folder)
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise missing_weights(folder, (file.name for file in Path(folder).iterdir()))
    return config, read_prefix(path, config)


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
    """Writes a cartridge anew, in fewer bytes: its keys and values. States of recurrent layers stay as they are.

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
        ValueError: the cartridge is damaged, has further trained modules or no keys and values, or there is no such
            quantization.
        ImportError: torchao is not installed, which `int8` and `int4` need.
    """
    source, output_dir = Path(source), Path(output_dir)
    config, prefix = read_cartridge(source)
    if config.modules_to_save:
        raise ValueError(f"{source} has `modules_to_save` beside its keys and values, which are not quantized.")
    if not config.num_tokens:
        raise ValueError(f"{source} has no keys and values (`num_tokens` is 0), and its states are not quantized.")
    if (output_dir / CONFIG_FILE).exists():
        raise FileExistsError(f"{output_dir} holds a cartridge already: give another `output_dir`.")
    config = dataclasses.replace(config, quantization=None if quantization == "none" else quantization)
    if quantization == "none" and prefix.keys:
        prefix = dataclasses.replace(prefix.to(torch.bfloat16), states=prefix.states)
    write_cartridge(output_dir, config, prefix)
    for file in source.iterdir():
        if file.is_file() and file.name not in (CONFIG_FILE, WEIGHTS_FILE, *PICKLED_FILES):
            shutil.copy2(file, output_dir / file.name)
    before, after = ((folder / WEIGHTS_FILE).stat().st_size for folder in (source, output_dir))
    return before, after
