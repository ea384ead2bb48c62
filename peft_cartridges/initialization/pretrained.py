"""A cartridge that goes on from another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from torch import nn

from ..adapter_folder import CONFIG_FILE, WEIGHTS_FILE, read_cartridge
from ..kv_prefix import KVPrefix


def pretrained(
    model: nn.Module,
    processing_class: Any,
    text: str | None,
    *,
    num_tokens: int,
    chat_template: bool,
    cartridge: KVPrefix | str | Path,
) -> KVPrefix:
    """The keys and values of another cartridge of the same base model and length: of an earlier version of the text, say,
    or of one like it (arXiv 2508.17032 finds that keys carry over between texts). `text` is not looked at.

    Args:
        cartridge: A folder, a name on the Hub (`user/name`, or `user/name@revision`), or a prefix.

    Raises:
        FileNotFoundError: there is no such folder, or no cartridge in it.
        ValueError: `cartridge` is damaged, or has another number of tokens.
    """
    prefix = cartridge if isinstance(cartridge, KVPrefix) else read_cartridge(_folder_of(str(cartridge)))[1]
    if prefix.num_tokens != num_tokens:
        raise ValueError(
            f"`cartridge` has {prefix.num_tokens} tokens, the one to be initialized {num_tokens}: make it with "
            f"`CartridgeConfig(num_tokens={prefix.num_tokens})`."
        )
    return prefix


def _folder_of(source: str) -> Path:
    name, _, revision = source.partition("@")
    if Path(source).is_dir() or len(Path(name).parts) != 2:
        return Path(source)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        path = hf_hub_download(name, file, revision=revision or None)
    return Path(path).parent
