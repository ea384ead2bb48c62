"""A cartridge of tokens that the model just reads."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..kv_prefix import KVPrefix
from .corpus_tokens import encode_corpus


def first_tokens(
    model: nn.Module, processing_class: Any, text: str, *, num_tokens: int, chat_template: bool
) -> KVPrefix:
    """Keys and values of the first `num_tokens` tokens of `text` as they stand in context, the paper's default (arXiv
    2506.06266). Only those are computed."""
    input_ids = encode_corpus(processing_class, text, num_tokens=num_tokens, chat_template=chat_template)
    return KVPrefix.from_input_ids(model, input_ids[:num_tokens])
