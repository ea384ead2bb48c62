"""The tokens that matter when the model recites the text, each head's own.

How a token is scored, by the most attention that it receives while the model reads the text once more behind itself, is
KVzip's rule (arXiv 2505.23416). Each head of each layer keeps the tokens that it needs, and the kept keys are moved
so that their distance from what comes behind the cartridge is the one that they had behind the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..chat import ChatCodec
from ..kv_prefix import KVPrefix
from .corpus_tokens import encode_corpus, recitations, window_parts
from .moved_keys import PROBE_TOKENS, move_prefix
from .reference_attention import LayerReading, read_behind

_ROWS_TOGETHER = 4


def most_attended(
    model: nn.Module, processing_class: Any, text: str, *, num_tokens: int, chat_template: bool
) -> KVPrefix:
    """Keys and values of the `num_tokens` most attended tokens of each head. A text that is longer than 8,192
    tokens, or than the model's window, is read in parts, of which each keeps an equal share.

    Raises:
        UnsupportedModelError: not all layers have attention, or keys cannot be moved.
    """
    codec = ChatCodec.of(model, processing_class)
    input_ids = encode_corpus(codec, text, num_tokens=num_tokens, chat_template=chat_template)
    sink, rest = input_ids[:1], input_ids[1:]
    parts = window_parts(model, rest)
    borders = [1 + (num_tokens - 1) * number // len(parts) for number in range(len(parts) + 1)]
    chosen: list[KVPrefix] = []
    for part, (start, end) in zip(parts, itertools.pairwise(borders), strict=True):
        prefix = KVPrefix.from_input_ids(model, [*sink, *part])
        if not chosen:
            chosen.append(
                prefix.without_states()[:1]
            )  # attention falls on the first token wherever it is: it stays there
        scores = attention_received(model, prefix, recitations(model, codec, part, chat_template=chat_template))
        kept = _select(prefix, [score[:, 1:].topk(end - start).indices.sort().values + 1 for score in scores])
        chosen.append(move_prefix(model, kept, end - len(part) - 1, part[:PROBE_TOKENS]))
    return KVPrefix.concatenate(chosen)


def attention_received(model: nn.Module, prefix: KVPrefix, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """The largest weight that any token of `rows` (token ids) gives each token of `prefix` as it is read behind it.

    Returns:
        One `[num_key_value_heads, num_tokens]` per layer, of all query heads of a group and of the later layers that
        share the keys.
    """
    received = [key.new_zeros(key.shape[:2], dtype=torch.float32) for key in prefix.keys]

    def observe(layer: LayerReading) -> None:
        largest = []
        for head in range(layer.key.shape[0]):
            scores = layer.scores(head)
            total = torch.logaddexp(scores.logsumexp(-1), layer.own_lse[head])
            largest.append((scores - total[:, None]).amax(0).exp())
        # Where all heads share one compressed key, its weight is the largest of theirs.
        score = received[layer.index]
        heads = torch.stack(largest).unflatten(0, (score.shape[0], -1)).amax(1)
        seen = score[:, score.shape[1] - heads.shape[1] :]
        torch.maximum(seen, heads.to(seen.device), out=seen)

    for start in range(0, len(rows), _ROWS_TOGETHER):
        read_behind(model, prefix, rows[start : start + _ROWS_TOGETHER], observe)
    return received


def _select(prefix: KVPrefix, indices: list[Tensor]) -> KVPrefix:
    """Of each layer and head (`[num_key_value_heads, kept]`) its own tokens."""

    def gather(tensor: Tensor, index: Tensor) -> Tensor:
        return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))

    return KVPrefix(tuple(map(gather, prefix.keys, indices)), tuple(map(gather, prefix.values, indices)))
