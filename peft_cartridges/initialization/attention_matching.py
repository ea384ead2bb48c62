"""Few keys and values that make each head's attention give what it gave with the whole text.

After attention matching (arXiv 2602.16284): reference texts are read behind the corpus, layer by layer with the compacted
layers below in place; of each head the keys that are attended to most are kept, and their values are fitted in closed
form. Ours is what counts as most: squared attention weights, summed by how surprising the token is that they help to
predict, without the corpus. Where the words would have come anyway, nothing has to be remembered; and the square favours
the keys that one query cannot do without over those that all look at a little.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.probe import UnsupportedModelError, base_model, execution_device
from ..chat import ChatCodec
from ..hidden_states import pad_right
from ..kv_prefix import KVPrefix, evaluating
from .corpus_tokens import encode_corpus, recitations, window_parts
from .moved_keys import PROBE_TOKENS, move_prefix
from .reference_attention import LayerReading, read_behind

# Of the accelerated projected gradient, which has converged by then.
_STEPS = 100
# Tokens of the reference texts that are read at a time, with logits for each.
_READ_ALONE = 512
# Between these a key may count for less or more than itself.
_LEAST, _MOST = 0.05, 20.0


def attention_matching(
    model: nn.Module,
    processing_class: Any,
    text: str,
    *,
    num_tokens: int,
    chat_template: bool,
    share_of_queries: float = 0.4,
    value_ridge: float = 1.0,
    key_bias: bool = False,
    references: Sequence[Sequence[int]] | None = None,
) -> KVPrefix:
    """Keys of the text that are attended to most where it matters, with values that make up for the others. A text that is
    longer than 8,192 tokens, or than the model's window, is compacted in parts, of which each has an equal share.

    Args:
        share_of_queries: How many of their tokens are asked what they attend to: those that are the most surprising
            without the text. Time grows with it.
        value_ridge: How much the values are held to those of their tokens, in units of the mean squared attention
            weight of a key.
        key_bias: Whether each key is also to count for what was left out around it: a non-negative factor of its
            weight, folded into the key along the direction that all queries have in common.
        references: Token ids of conversations about the text, the turns alone, to ask besides.

    Raises:
        ValueError: `text` is empty or shorter than the cartridge, or an option is out of its range.
        UnsupportedModelError: not all layers have attention, keys cannot be moved, or all heads share compressed keys.
    """
    if not 0 < share_of_queries <= 1:
        raise ValueError(f"`share_of_queries` must be above 0 and at most 1, got {share_of_queries}.")
    if value_ridge <= 0:
        raise ValueError(f"`value_ridge` must be above 0, got {value_ridge}.")
    codec = ChatCodec.of(model, processing_class)
    input_ids = encode_corpus(codec, text, num_tokens=num_tokens, chat_template=chat_template)
    sink, rest = input_ids[:1], input_ids[1:]
    parts = window_parts(model, rest)
    borders = [1 + (num_tokens - 1) * number // len(parts) for number in range(len(parts) + 1)]
    compacted: list[KVPrefix] = []
    for part, (start, end) in zip(parts, itertools.pairwise(borders), strict=True):
        prefix = KVPrefix.from_input_ids(model, [*sink, *part])
        rows: list[Sequence[int]] = [
            *recitations(model, codec, part, chat_template=chat_template),
            *(references or ()),
        ]
        weight = surprise(model, rows)
        compactor = _Compactor(prefix, end - start + 1, weight, share_of_queries, value_ridge, key_bias)
        read_behind(model, prefix, rows, compactor)
        moved = move_prefix(model, compactor.prefix(), end - len(part) - 1, part[:PROBE_TOKENS])
        compacted.append(moved[1:] if compacted else moved)
    return KVPrefix.concatenate(compacted)


@torch.no_grad()
def surprise(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Of all tokens of all rows, one after another, the negative log-likelihood in nats of what follows, without a text in
    front; 0 for the last of a row."""
    found, device = [], execution_device(base_model(model).get_input_embeddings())
    together = max(1, _READ_ALONE // max(map(len, rows)))  # logits are large
    with evaluating(model):
        for first in range(0, len(rows), together):
            some = rows[first : first + together]
            ids = pad_right(some).to(device)
            log_probs = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            lost = -log_probs.gather(-1, ids[:, 1:, None])[..., 0]
            for row, of_row in zip(some, lost, strict=True):
                found += [of_row[: len(row) - 1], of_row.new_zeros(1)]
    return torch.cat(found)


class _Compactor:
    """Compacts each layer when it is read, and lets those above see what comes of it.

    Args:
        prefix: Keys and values of the text, the attention sink first.
        num_tokens: How many tokens of it to keep, the sink among them.
        surprise: Of each query, `[num_queries]`.
        share, ridge, bias: As the strategy's options.
    """

    def __init__(
        self, prefix: KVPrefix, num_tokens: int, surprise: Tensor, share: float, ridge: float, bias: bool
    ) -> None:
        self.whole, self.num_tokens, self.ridge, self.bias = prefix, num_tokens, ridge, bias
        self.asked = surprise.topk(max(1, int(len(surprise) * share))).indices.sort().values
        self.num_queries, self.surprise = len(surprise), surprise[self.asked]
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def prefix(self) -> KVPrefix:
        layers = range(self.whole.num_layers)
        return KVPrefix(tuple(self.keys[i] for i in layers), tuple(self.values[i] for i in layers))

    def __call__(self, layer: LayerReading) -> tuple[Tensor, Tensor] | None:
        if layer.is_latent:
            raise UnsupportedModelError(
                "`attention_matching` fits the values of each head, and here all heads share compressed ones: use "
                '`strategy="most_attended"`.'
            )
        if layer.index in self.keys:  # a later layer that shares the keys of this one
            return None
        windowed = layer.key.shape[1] < self.whole.num_tokens
        heads = [self._compact(layer, head, windowed) for head in range(layer.key.shape[0])]
        dtype = self.whole.dtype
        self.keys[layer.index] = torch.stack([key for key, _ in heads]).to(dtype)
        self.values[layer.index] = torch.stack([value for _, value in heads]).to(dtype)
        # Beyond a window, the distances of what is kept are no longer those of the text.
        return None if layer.mask is not None else (self.keys[layer.index], self.values[layer.index])

    def _compact(self, layer: LayerReading, head: int, windowed: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of one head, `[num_tokens, key_dim | value_dim]`."""
        group = layer.own_lse.shape[1] // self.num_queries
        index, surprise = (tensor.to(layer.key.device) for tensor in (self.asked, self.surprise))
        asked = torch.cat([index + member * self.num_queries for member in range(group)])
        surprise = surprise.repeat(group)
        scores, own_lse = layer.scores(head, asked), layer.own_lse[head, asked]
        total = torch.logaddexp(scores.logsumexp(-1), own_lse)
        weights = (scores - total[:, None]).exp_()  # of the text's tokens, `[asked, in_sight]`
        received = (weights.square() * surprise[:, None]).sum(0)
        hidden = received.new_zeros(self.whole.num_tokens - len(received))
        received = torch.cat([hidden, received])
        received[0] = torch.inf  # attention falls on the first token wherever it is
        kept = received.topk(self.num_tokens).indices.sort().values
        key, value = (tensors[layer.index][head].float() for tensors in (self.whole.keys, self.whole.values))
        if windowed:  # where most of the text is out of sight, there is nothing to make up for
            return key[kept], value[kept]
        own = (own_lse - total).exp()[:, None]
        own_part = own * layer.own_output[head, asked]
        wanted = weights @ value + own_part
        importance = (surprise / surprise.mean().clamp_min(1e-6))[:, None]
        key, value, some = key[kept], value[kept], weights[:, kept]
        if self.bias and layer.scoring.softcap is None:
            query = layer.query[head, asked].float() * layer.scoring.scale
            factor = _non_negative_factors(some, 1 - own[:, 0], importance, self.ridge)
            key = key + factor.log()[:, None] * _common_direction(query)
            some = (query @ key.T - total[:, None]).exp()
        mass = some.sum(1, keepdim=True) + own
        some = some / mass
        missing = wanted - own_part / mass - some @ value
        value[1:] += _ridge(some[:, 1:], missing, importance, self.ridge)
        return key, value


def _ridge(inputs: Tensor, targets: Tensor, importance: Tensor, ridge: float) -> Tensor:
    """The `x` that minimizes `importance · (inputs @ x - targets)² + ridge · x²`, the latter in units of the mean
    squared norm of a column of `inputs`."""
    weighted = inputs * importance
    gram = inputs.T @ weighted
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(1e-12))
    return torch.cholesky_solve(weighted.T @ targets, torch.linalg.cholesky(gram))


def _non_negative_factors(weights: Tensor, mass: Tensor, importance: Tensor, ridge: float) -> Tensor:
    """Factors of the kept keys' weights (`[asked, kept]`) by which they sum up to all the text's (`[asked]`): least squares
    with bounds, held to 1."""
    weighted = weights * importance
    gram = weights.T @ weighted
    hold = ridge * gram.diagonal().mean().clamp_min(1e-12)
    gram.diagonal().add_(hold)
    wanted = weighted.T @ mass + hold
    step = 1 / torch.linalg.matrix_norm(gram, ord=float("inf"))  # at least the largest eigenvalue
    factor = ahead = torch.ones_like(wanted)
    speed = 1.0
    for _ in range(_STEPS):
        new = (ahead - step * (gram @ ahead - wanted)).clamp(_LEAST, _MOST)
        new_speed = (1 + (1 + 4 * speed**2) ** 0.5) / 2
        ahead, factor, speed = new + (speed - 1) / new_speed * (new - factor), new, new_speed
    return factor


def _common_direction(query: Tensor) -> Tensor:
    """The vector whose product with every query (`[asked, key_dim]`, scaled) is as close to 1 as can be: added to a key, it
    adds a bias to the key's scores."""
    gram = query.T @ query
    gram.diagonal().add_(1e-2 * gram.diagonal().mean().clamp_min(1e-12))
    return torch.linalg.solve(gram, query.sum(0))
