"""Few keys and values that make each head's attention give what it gave with the whole text.

After attention matching (arXiv 2602.16284): reference texts are read behind the corpus, and of each head the keys that are
attended to most are kept; then they are read again, layer by layer with the compacted layers below in place, and values are
fitted in closed form. Ours is

- what counts as most: squared attention weights, summed by how surprising the token is that they help to predict, without
  the corpus. Where the words would have come anyway, nothing has to be remembered; and the square favours the keys that one
  query cannot do without over those that all look at a little;
- what is fitted to: what the head gives in the model that has the whole text in all layers, so that a layer makes up for
  what those below it have lost;
- that keys and values are then improved together by some steps of gradient descent, each head by itself. There is no bias
  of a key, which the format has no place for: the share of attention that the text gets is left to its keys.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attention.plain_attention import BITS
from ..attention.probe import UnsupportedModelError, base_model, execution_device
from ..chat import ChatCodec
from ..hidden_states import pad_right
from ..kv_prefix import KVPrefix, evaluating
from .corpus_tokens import encode_corpus, recitations, window_parts
from .moved_keys import PROBE_TOKENS, move_prefix
from .reference_attention import LayerReading, Observer, read_behind

# Tokens of a recited piece. Where a piece begins, the model has to find its place in the text by itself: short pieces ask for
# more of that, as questions do.
_PIECE = 64
# Queries of a step of gradient descent, and how far it goes at most, in units of the mean size of a head's keys and values.
_BATCH, _RATE = 512, 0.02
# Tokens of the reference texts that are read at a time, with logits for each.
_READ_ALONE = 512
# Weights held at a time.
_WEIGHTS = 1 << 20


def attention_matching(
    model: nn.Module,
    processing_class: Any,
    text: str,
    *,
    num_tokens: int,
    chat_template: bool,
    share_of_queries: float = 0.4,
    value_ridge: float = 1.0,
    steps: int = 60,
    references: Sequence[Sequence[int]] | None = None,
) -> KVPrefix:
    """Keys of the text that are attended to most where it matters, with values that make up for the others. A text that is
    longer than 8,192 tokens, or than the model's window, is compacted in parts, of which each has an equal share.

    Args:
        share_of_queries: How many of their tokens are asked what they attend to: those that are the most surprising
            without the text.
        value_ridge: How much the values are held to those of their tokens before the steps, in units of the mean squared
            attention weight of a key.
        steps: Of gradient descent on keys and values of each layer. Time grows with them.
        references: Token ids of conversations about the text, the turns alone, to ask besides.

    Raises:
        ValueError: `text` is empty or shorter than the cartridge, or an option is out of its range.
        UnsupportedModelError: not all layers have attention, keys cannot be moved, or all heads share compressed keys.
    """
    if not 0 < share_of_queries <= 1:
        raise ValueError(f"`share_of_queries` must be above 0 and at most 1, got {share_of_queries}.")
    if value_ridge <= 0:
        raise ValueError(f"`value_ridge` must be above 0, got {value_ridge}.")
    if steps < 0:
        raise ValueError(f"`steps` must be at least 0, got {steps}.")
    codec = ChatCodec.of(model, processing_class)
    input_ids = encode_corpus(codec, text, num_tokens=num_tokens, chat_template=chat_template)
    sink, rest = input_ids[:1], input_ids[1:]
    parts = window_parts(model, rest)
    borders = [1 + (num_tokens - 1) * number // len(parts) for number in range(len(parts) + 1)]
    compacted: list[KVPrefix] = []
    for part, (start, end) in zip(parts, itertools.pairwise(borders), strict=True):
        prefix = KVPrefix.from_input_ids(model, [*sink, *part])
        rows: list[Sequence[int]] = [
            *recitations(model, codec, part, chat_template=chat_template, piece=_PIECE),
            *(references or ()),
        ]
        asked = _Asked(surprise(model, rows), share_of_queries)
        whole = _Whole(prefix, end - start + 1, asked)
        compactor = _Compactor(whole, value_ridge, steps)
        said = f"Attention matching, part {len(compacted) + 1} of {len(parts)}"
        with tqdm(total=2 * prefix.num_layers, desc=said, unit=" layers", delay=2, leave=False) as shown:
            read_behind(model, prefix, rows, _counted(whole, shown))
            read_behind(model, prefix, rows, _counted(compactor, shown, prefix.num_layers))
        moved = move_prefix(model, compactor.prefix(), end - len(part) - 1, part[:PROBE_TOKENS])
        compacted.append(moved[1:] if compacted else moved)
    return KVPrefix.concatenate(compacted)


def _counted(observe: Observer, shown: tqdm[Any], done: int = 0) -> Observer:
    def observe_and_count(layer: LayerReading) -> tuple[Tensor, Tensor] | None:
        made = observe(layer)
        shown.update(done + layer.index + 1 - shown.n)
        return made

    return observe_and_count


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


class _Asked:
    """The tokens of the reference texts that are asked what they attend to.

    Args:
        surprise: Of every token, `[num_queries]`.
        share: How many of them; the most surprising.
    """

    def __init__(self, surprise: Tensor, share: float) -> None:
        self.num_queries = len(surprise)
        self.index = surprise.topk(max(1, int(len(surprise) * share))).indices.sort().values
        self.surprise = surprise[self.index]

    def queries(self, layer: LayerReading) -> _Queries:
        """What they ask of a layer."""
        group = layer.own_lse.shape[1] // self.num_queries
        device = layer.key.device
        index, importance = self.index.to(device), self.surprise.to(device)
        index = torch.cat([index + member * self.num_queries for member in range(group)])
        importance = importance.repeat(group)
        return _Queries(layer, index, importance / importance.mean().clamp_min(1e-6))


class _Queries:
    """Some queries of a layer: `query` `[heads, asked, key_dim]`, in the model's dtype, in which all large products are made;
    `own_lse` `[heads, asked]` and `own_output` `[heads, asked, value_dim]` as a layer reading's; `importance` `[asked]`, 1 in
    the mean. Scores and log-sum-exps are in bits (`BITS` says why)."""

    def __init__(self, layer: LayerReading, index: Tensor, importance: Tensor) -> None:
        self.query = (layer.query[:, index].float() * (layer.scoring.scale * BITS)).to(layer.query.dtype)
        self.own_lse, self.own_output = layer.own_lse[:, index] * BITS, layer.own_output[:, index]
        self.importance = importance
        self.softcap = None if layer.scoring.softcap is None else layer.scoring.softcap * BITS
        self.mask = None if layer.mask is None else layer.mask[index]

    def multiplied(self, left: Tensor, right: Tensor) -> Tensor:
        """The product of batches of matrices in the model's dtype, given back as float32."""
        return (left.to(self.query.dtype) @ right.to(self.query.dtype)).float()

    def scores(self, key: Tensor, kept: Tensor | None = None, some: slice | Tensor = slice(None)) -> Tensor:
        """`[heads, some, tokens]`: of keys `[heads, tokens, key_dim]`, which are those that `kept` `[heads, tokens]` says of
        the tokens in sight."""
        scores = self.multiplied(self.query[:, some], key.mT)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.mask is not None:
            mask = self.mask[some]
            scores = scores + (mask if kept is None else mask[:, kept].transpose(0, 1))
        return scores

    def weights(
        self, key: Tensor, kept: Tensor | None = None, some: slice | Tensor = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Attention weights of the keys, `[heads, some, tokens]`, and of all that is the queries' own, `[heads, some, 1]`."""
        scores, own = self.scores(key, kept, some), self.own_lse[:, some, None]
        highest = torch.maximum(scores.amax(-1, keepdim=True), own)
        weights, own = scores.sub_(highest).exp2_(), (own - highest).exp2()
        total = weights.sum(-1, keepdim=True) + own
        return weights.div_(total), own / total

    def output(self, weights: Tensor, own: Tensor, value: Tensor, some: slice | Tensor = slice(None)) -> Tensor:
        """What the heads give, `[heads, some, value_dim]`."""
        return self.multiplied(weights, value) + own * self.own_output[:, some]

    def gradients(
        self, key: Tensor, value: Tensor, wanted: Tensor, kept: Tensor, some: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of half the squared errors of some queries, by their importance, for keys and values; `wanted` is theirs."""
        scores = self.scores(key, kept, some)
        # A masked score is far below the cap, and its weight 0.
        steep = None if self.softcap is None else 1 - (scores / self.softcap).clamp_min(-1).square()
        highest = torch.maximum(scores.amax(-1, keepdim=True), self.own_lse[:, some, None])
        weights, own = scores.sub_(highest).exp2_(), (self.own_lse[:, some, None] - highest).exp2()
        share = 1 / (weights.sum(-1, keepdim=True) + own)
        weights = weights.to(self.query.dtype)
        output = (self.multiplied(weights, value) + own * self.own_output[:, some]) * share
        error = (output - wanted) * (self.importance[some, None] * share)
        d_value = self.multiplied(weights.mT, error)
        # One more column subtracts what is common to all of a query's.
        wide = torch.cat([value, torch.ones_like(value[..., :1])], -1).to(weights.dtype)
        d_scores = torch.cat([error, -(error * output).sum(-1, keepdim=True)], -1).to(weights.dtype) @ wide.mT
        d_scores.mul_(weights)
        if steep is not None:
            d_scores.mul_(steep)
        return self.multiplied(d_scores.mT, self.query[:, some]) / BITS, d_value

    def pieces(self, num_tokens: int) -> Iterator[slice]:
        """All queries, so few at a time that their weights stay small."""
        heads, asked = self.own_lse.shape
        step = max(1, _WEIGHTS // (heads * num_tokens))
        for start in range(0, asked, step):
            yield slice(start, start + step)


class _Whole:
    """What each layer gives with the whole text in all layers, and which tokens its heads keep.

    Args:
        prefix: Keys and values of the text, the attention sink first.
        num_tokens: How many tokens of it to keep, the sink among them.
        asked: Of the reference texts.
    """

    def __init__(self, prefix: KVPrefix, num_tokens: int, asked: _Asked) -> None:
        self.prefix, self.num_tokens, self.asked = prefix, num_tokens, asked
        self.kept: dict[int, Tensor] = {}  # `[heads, num_tokens]`
        self.output: dict[int, Tensor] = {}  # `[heads, asked, value_dim]`

    def __call__(self, layer: LayerReading) -> None:
        if layer.is_latent:
            raise UnsupportedModelError(
                "`attention_matching` fits the values of each head, and here all heads share compressed ones: use "
                '`strategy="most_attended"`.'
            )
        if layer.index in self.kept:  # a later layer that shares the keys of this one
            return
        queries = self.asked.queries(layer)
        key, value = layer.key, layer.value
        received = key.new_zeros(len(key), self.prefix.num_tokens, dtype=torch.float32)
        in_sight = received[:, received.shape[1] - key.shape[1] :]
        outputs = []
        for some in queries.pieces(key.shape[1]):
            weights, own = queries.weights(key, some=some)
            outputs.append(queries.output(weights, own, value, some))
            in_sight += queries.importance[some] @ weights.square_()
        received[:, 0] = torch.inf  # attention falls on the first token wherever it is
        self.kept[layer.index] = received.topk(self.num_tokens).indices.sort().values
        self.output[layer.index] = torch.cat(outputs, 1).to(layer.value.dtype)


class _Compactor:
    """Compacts each layer when it is read, and lets those above see what comes of it.

    Args:
        whole: Which tokens to keep, and what the heads are to give.
        ridge, steps: As the strategy's options.
    """

    def __init__(self, whole: _Whole, ridge: float, steps: int) -> None:
        self.whole, self.ridge, self.steps = whole, ridge, steps
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def prefix(self) -> KVPrefix:
        layers = range(self.whole.prefix.num_layers)
        return KVPrefix(tuple(self.keys[i] for i in layers), tuple(self.values[i] for i in layers))

    def __call__(self, layer: LayerReading) -> tuple[Tensor, Tensor] | None:
        if layer.index in self.keys:  # a later layer that shares the keys of this one
            return None
        prefix, kept = self.whole.prefix, self.whole.kept[layer.index]
        key, value = (
            tensors[layer.index].gather(1, kept[..., None].expand(-1, -1, tensors[layer.index].shape[-1]))
            for tensors in (prefix.keys, prefix.values)
        )
        # With all tokens there is nothing to make up for, nor where most of the text is out of sight.
        if self.whole.num_tokens < prefix.num_tokens and layer.key.shape[1] >= self.whole.num_tokens:
            queries, wanted = self.whole.asked.queries(layer), self.whole.output[layer.index].float()
            unseen = prefix.num_tokens - layer.key.shape[1]
            fitted = _fit(queries, key.float(), value.float(), wanted, kept - unseen, self.ridge, self.steps)
            key, value = (tensor.to(prefix.dtype) for tensor in fitted)
        self.keys[layer.index], self.values[layer.index] = key, value
        # Beyond a window, the distances of what is kept are no longer those of the text.
        return None if layer.mask is not None else (key, value)


def _fit(
    queries: _Queries, key: Tensor, value: Tensor, wanted: Tensor, kept: Tensor, ridge: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Keys and values with which the heads give nearly what is wanted, `[heads, asked, value_dim]`; those of the first token
    stay. A head whose error does not fall keeps what it had."""
    gram = wanted.new_zeros(len(key), key.shape[1] - 1, key.shape[1] - 1)
    aim = wanted.new_zeros(len(key), key.shape[1] - 1, value.shape[2])
    for some in queries.pieces(key.shape[1]):
        weights, own = queries.weights(key, kept, some)
        missing = wanted[:, some] - queries.output(weights, own, value, some)
        weights = weights[..., 1:]
        weighted = (weights * queries.importance[some, None]).mT
        gram += weighted @ weights
        aim += queries.multiplied(weighted, missing)
    value = torch.cat([value[:, :1], value[:, 1:] + _ridge(gram, aim, ridge)], 1)
    if not steps:
        return key, value
    found = _descend(queries, key, value, wanted, kept, steps)
    before, after = (_errors(queries, *pair, wanted, kept) for pair in ((key, value), found))
    better = (after < before)[:, None, None]
    return torch.where(better, found[0], key), torch.where(better, found[1], value)


def _ridge(gram: Tensor, aim: Tensor, ridge: float) -> Tensor:
    """The `x` that minimizes `x · gram @ x / 2 - x · aim + ridge · x² / 2`, the last in units of the mean of `gram`'s
    diagonal; batches of matrices."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    held = gram.clone()
    held.diagonal(dim1=-2, dim2=-1).add_(ridge * diagonal.mean(-1, keepdim=True).clamp_min(1e-12))
    return torch.cholesky_solve(aim, torch.linalg.cholesky(held))


def _errors(queries: _Queries, key: Tensor, value: Tensor, wanted: Tensor, kept: Tensor) -> Tensor:
    """Squared errors of each head, the queries by their importance: `[heads]`."""
    error = wanted.new_zeros(len(key))
    for some in queries.pieces(key.shape[1]):
        missing = queries.output(*queries.weights(key, kept, some), value, some) - wanted[:, some]
        error += (missing.square().sum(-1) * queries.importance[some]).sum(-1)
    return error


def _descend(
    queries: _Queries, key: Tensor, value: Tensor, wanted: Tensor, kept: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Keys and values after some steps of Adam on the errors of random queries, of all heads at once. The gradients are
    written out, which takes less time than autograd: there are thousands of these steps."""
    start = (key, value)
    sizes = [tensor[:, 1:].square().mean((1, 2), keepdim=True).sqrt() for tensor in start]
    moves = [torch.zeros_like(tensor[:, 1:]) for tensor in start]
    optimizer = torch.optim.Adam(moves, lr=_RATE, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _RATE * (1 + math.cos(math.pi * step / steps)) / 2
        some = torch.randint(wanted.shape[1], (min(_BATCH, wanted.shape[1]),), generator=generator).to(wanted.device)
        gradients = queries.gradients(key, value, wanted[:, some], kept, some)
        for move, gradient, size in zip(moves, gradients, sizes, strict=True):
            move.grad = gradient[:, 1:] * size
        optimizer.step()
        key, value = (
            torch.cat([tensor[:, :1], tensor[:, 1:] + size * move], 1)
            for tensor, size, move in zip(start, sizes, moves, strict=True)
        )
    return key, value
