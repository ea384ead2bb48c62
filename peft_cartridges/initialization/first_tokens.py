"""The first tokens of the corpus as they stand in context: the paper's default (arXiv 2506.06266)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..chat import encode_context
from ..kv_prefix import KVPrefix


def first_tokens(
    model: nn.Module, processing_class: Any, text: str, *, num_tokens: int, chat_template: bool
) -> KVPrefix:
    """Keys and values of the first `num_tokens` tokens of `text`. Only those are computed."""
    input_ids = encode_context(processing_class, text, chat_template=chat_template)
    if len(input_ids) < num_tokens:
        raise ValueError(
            f"`text` has {len(input_ids)} tokens, fewer than `num_tokens={num_tokens}` of the cartridge: a cartridge "
            "is to be smaller than its corpus. Lower `num_tokens`, or pass a longer text."
        )
    return KVPrefix.from_input_ids(model, input_ids[:num_tokens])
