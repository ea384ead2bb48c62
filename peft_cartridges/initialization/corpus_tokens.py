"""The corpus that a cartridge starts from, as token ids."""

from __future__ import annotations

from typing import Any

from ..chat import ChatCodec


def encode_corpus(processing_class: Any, text: str, *, num_tokens: int, chat_template: bool) -> list[int]:
    """`text` as a context in front of a conversation; see `ChatCodec.encode_context`.

    Raises:
        ValueError: it is empty, or shorter than the cartridge of `num_tokens` tokens.
    """
    input_ids = ChatCodec.of(None, processing_class).encode_context(text, chat_template=chat_template)
    if len(input_ids) < num_tokens:
        raise ValueError(
            f"`text` has {len(input_ids)} tokens, fewer than `num_tokens={num_tokens}` of the cartridge: a cartridge "
            "is to be smaller than its corpus. Lower `num_tokens`, or pass a longer text."
        )
    return input_ids
