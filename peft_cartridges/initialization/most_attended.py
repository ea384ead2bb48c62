"""The tokens that matter when the model recites the text, each head's own.

How a token is scored, by the most attention that it receives while the model reads the text once more behind itself, is
KVzip's rule (arXiv 2505.23416). Each head of each layer keeps the tokens that it needs, and the kept keys are moved
so that their distance from what comes behind the cartridge is the one that they had behind the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..attention.probe import get_text_config
from ..chat import ChatCodec
from ..kv_prefix import KVPrefix
from .attention_received import attention_received
from .corpus_tokens import encode_corpus
from .moved_keys import move_prefix

_REQUEST = "Repeat the next part of the text, word for word."
# Tokens that are read at a time, so that their attention weights stay small, and recited at a time; what the request and a
# chat template's tokens take beside them; and of how many tokens a turn of the keys is measured.
_READ, _RECITED, _AROUND, _PROBE = 8192, 192, 64, 64


def most_attended(
    model: nn.Module, processing_class: Any, text: str, *, num_tokens: int, chat_template: bool
) -> KVPrefix:
    """Keys and values of the `num_tokens` most attended tokens of each head. A text that is longer than 8,192
    tokens, or than the model's window, is read in parts, of which each keeps an equal share."""
    codec = ChatCodec.of(model, processing_class)
    input_ids = encode_corpus(codec, text, num_tokens=num_tokens, chat_template=chat_template)
    sink, rest = input_ids[:1], input_ids[1:]
    window = getattr(get_text_config(model), "max_position_embeddings", None) or 2 * _READ
    recited = min(_RECITED, window // 4)
    parts = _parts(rest, min(_READ, window - recited - _AROUND))
    borders = [1 + (num_tokens - 1) * number // len(parts) for number in range(len(parts) + 1)]
    chosen: list[KVPrefix] = []
    for part, (start, end) in zip(parts, itertools.pairwise(borders), strict=True):
        prefix = KVPrefix.from_input_ids(model, [*sink, *part])
        if not chosen:
            chosen.append(prefix[:1])  # attention falls on the first token wherever it is: it stays there
        scores = attention_received(model, prefix, _recitations(codec, part, recited, chat_template))
        kept = _select(prefix, [score[:, 1:].topk(end - start).indices.sort().values + 1 for score in scores])
        chosen.append(move_prefix(model, kept, end - len(part) - 1, part[:_PROBE]))
    return KVPrefix.concatenate(chosen)


def _parts(ids: Sequence[int], longest: int) -> list[Sequence[int]]:
    number = -(-len(ids) // max(1, longest))
    cuts = [len(ids) * part // number for part in range(number + 1)]
    return [ids[start:end] for start, end in itertools.pairwise(cuts)]


def _recitations(codec: ChatCodec, ids: Sequence[int], at_a_time: int, chat_template: bool) -> list[list[int]]:
    pieces = [ids[start : start + at_a_time] for start in range(0, len(ids), at_a_time)]
    if not (chat_template and codec.has_template):
        return [list(piece) for piece in pieces]
    return [
        codec.encode_turns(
            [
                {"role": "user", "content": _REQUEST},
                {"role": "assistant", "content": codec.decode(piece)},
            ],
        )
        for piece in pieces
    ]


def _select(prefix: KVPrefix, indices: list[Tensor]) -> KVPrefix:
    """Of each layer and head (`[num_key_value_heads, kept]`) its own tokens."""

    def gather(tensor: Tensor, index: Tensor) -> Tensor:
        return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))

    return KVPrefix(
        tuple(map(gather, prefix.keys, indices)),
        tuple(map(gather, prefix.values, indices)),
    )
