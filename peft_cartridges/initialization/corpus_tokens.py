"""The corpus that a cartridge starts from, as token ids: whole, in parts that fit the model's window, and recited."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..attention.probe import get_text_config
from ..chat import ChatCodec

_REQUEST = "Repeat the next part of the text, word for word."
# Tokens that are read at a time, so that their attention weights stay small, and recited at a time; and what the request
# and a chat template's tokens take beside them.
_READ, _RECITED, _AROUND = 8192, 192, 64


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


def window_parts(model: nn.Module, ids: Sequence[int]) -> list[Sequence[int]]:
    """`ids` in equal parts, each of which fits the model's window (and 8,192 tokens) with its recitation behind it."""
    window = read_window(model)
    return parts_of_at_most(max(1, min(_READ, window - _recited(window) - _AROUND)), ids)


def parts_of_at_most(longest: int, ids: Sequence[int]) -> list[Sequence[int]]:
    """`ids` in equal parts of at most `longest` tokens."""
    number = max(1, -(-len(ids) // longest))
    cuts = [len(ids) * part // number for part in range(number + 1)]
    return [ids[start:end] for start, end in itertools.pairwise(cuts)]


def recitations(
    model: nn.Module, processing_class: Any, ids: Sequence[int], *, chat_template: bool, piece: int = _RECITED
) -> list[list[int]]:
    """Rows of token ids that recite a part of the corpus in pieces of so many tokens (and a quarter of the window at most),
    each as the answer to a request for it where there is a chat template."""
    codec, step = ChatCodec.of(model, processing_class), min(piece, _recited(read_window(model)))
    pieces = [ids[start : start + step] for start in range(0, len(ids), step)]
    if not (chat_template and codec.has_template):
        return [list(piece) for piece in pieces]
    return [
        codec.encode_turns(
            [
                {"role": "user", "content": _REQUEST},
                {"role": "assistant", "content": codec.decode(piece)},
            ]
        )
        for piece in pieces
    ]


def read_window(model: nn.Module) -> int:
    """How many positions may be read. Where the rotary embeddings change with the length of what is read, only those before
    they do: keys of a long text would be turned otherwise than those of the shorter cartridge."""
    config = get_text_config(model)
    window = getattr(config, "max_position_embeddings", None) or 2 * _READ
    given = getattr(config, "rope_parameters", None) or {}
    for rope in (given, *(value for value in given.values() if isinstance(value, dict))):  # or one a layer type
        if rope.get("rope_type") in ("dynamic", "longrope"):
            first = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            window = min(window, first or window)
    return window


def _recited(window: int) -> int:
    return min(_RECITED, window // 4)
