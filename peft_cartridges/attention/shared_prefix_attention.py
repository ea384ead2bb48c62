"""Attention to prefixes that the rows of a batch share, exactly, with its own backward.

    softmax([q·K_prefix, q·K]) [V_prefix; V]  =  merge(attend(q, K_prefix, V_prefix), attend(q, K, V))

The rows of a batch are folded into the query axis of the prefix part, so all rows meet one copy of the prefix in one
product, and nothing of size batch x prefix is stored. Parts are merged by their log-sum-exp; each part's backward runs
with the merged output and log-sum-exp, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .kernels import attend, attend_backward
from .merge import merge
from .plain_attention import Gradients, Part, Scoring, Wanted, repeat_heads

# With so many queries of a row to all prefixes of a batch, attending to all and picking one is cheaper than a copy of
# its prefix for every row.
_PICKED_QUERIES = 8
# Blocks of work that keep a GPU's processors busy, two for each of an H100's 132, and the keys of a block in flash
# attention's backward.
_GPU_BLOCKS, _BLOCK_KEYS = 264, 128


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Rows of a batch in groups, each row in one or in none.

    Args:
        order: Numbers of the rows, group after group, `[rows in a group]`.
        sizes: How many rows each group has, at least one.
        places: Where each row of the batch stands in `order`, `[batch]`; `None` where some are in no group.
    """

    order: Tensor
    sizes: tuple[int, ...]
    places: Tensor | None

    @classmethod
    def of(cls, groups: Sequence[Sequence[int]], batch_size: int) -> RowGroups:
        order = torch.tensor([row for rows in groups for row in rows])
        return cls(order, tuple(map(len, groups)), order.argsort() if len(order) == batch_size else None)

    def to(self, device: torch.device) -> RowGroups:
        if self.order.device == device:
            return self
        places = None if self.places is None else self.places.to(device)
        return RowGroups(self.order.to(device), self.sizes, places)

    def rows(self, group: int) -> Tensor:
        """Numbers of a group's rows."""
        return self.order.split(self.sizes)[group]


@dataclass(frozen=True)
class PrefixPart:
    """A prefix in one attention layer that all rows of a batch share, or some.

    Args:
        key: `[num_key_value_heads, num_tokens, key_dim]`.
        value: `[num_key_value_heads, num_tokens, value_dim]`.
        mask: Additive, `[batch, q_len, num_tokens]`; `None` where every query sees every token.
        group: Where only some rows share it, which (`mask` has those rows alone then): a group's number among `RowGroups`.
            Those of the same `RowGroups` are computed and merged together.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    group: tuple[RowGroups, int] | None = None

    @property
    def rows(self) -> Tensor | None:
        return None if self.group is None else self.group[0].rows(self.group[1])


@dataclass(frozen=True)
class RowPrefixes:
    """A prefix of its own for every row of a batch, in one attention layer; computed in one go for all rows.

    Args:
        key: `[num_prefixes, num_key_value_heads, num_tokens, key_dim]`; the shorter prefixes padded with zeros.
        value: `[num_prefixes, num_key_value_heads, num_tokens, value_dim]`.
        lengths: How many tokens each prefix has, `[num_prefixes]`; `None` where all have `num_tokens`.
        index: Which prefix each row has, `[batch]`, -1 for none; `None` where row i has prefix i.
        mask: Additive, `[batch, q_len, num_tokens]`, beside the lengths; `None` where every query sees every token.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor | None = None
    index: Tensor | None = None
    mask: Tensor | None = None


Prefix = PrefixPart | RowPrefixes


def shared_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[Prefix],
    *,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    scoring: Scoring,
) -> Tensor:
    """Attention of every row to its prefixes and to its own keys and values.

    Args:
        query: `[batch, num_heads, q_len, key_dim]`.
        key, value: The rows' own, `[batch, num_key_value_heads, kv_len, key_dim | value_dim]`.
        prefixes: The shared parts, and those of single rows.
        mask: Additive mask of the rows' own part, broadcastable to `[batch, num_heads, q_len, kv_len]`.
        sinks: Learned scores `[num_heads]` that take part in the softmax and carry no value (GPT-OSS).
        scoring: Scale, soft cap, and whether the rows' own part is causal (with `mask` then `None`).

    Returns:
        `[batch, num_heads, q_len, value_dim]`, in the dtype of `query`, or, as from PyTorch's own attention, in
        autocast's where that is active.
    """
    device = query.device.type
    returned = dtype = query.dtype
    if not dtype == key.dtype == value.dtype:
        dtype = torch.promote_types(torch.promote_types(dtype, key.dtype), value.dtype)
    if autocast := torch.is_autocast_enabled(device):
        if dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        returned = dtype
    tensors = [tensor for prefix in prefixes for tensor in (prefix.key, prefix.value)]
    query, key, value, *tensors = (
        tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in (query, key, value, *tensors)
    )
    mask = None if mask is None else _narrowed(mask, dtype)
    q_len, heads, kv_heads = query.shape[2], query.shape[1], key.shape[1]
    scores = None if sinks is None else sinks.view(1, -1, 1)
    if packed := q_len == 1 and heads > kv_heads and (mask is None or mask.shape[1] == 1):
        # One query a row: the heads of a group are as good as that many queries.
        query = query.reshape(len(query), kv_heads, heads // kv_heads, -1)
        scores = None if sinks is None else sinks.view(1, kv_heads, -1)
        scoring = scoring.whole
    inputs = (query, key, value, *tensors) + (() if sinks is None else (sinks,))
    arguments: tuple[Any, ...] = (query, key, value, scores, mask, scoring, prefixes, not packed, *tensors)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        with torch.autocast(device, enabled=False):
            output = _SharedPrefixAttention.apply(*arguments)
    elif autocast:
        with torch.autocast(device, enabled=False):
            output = _forward(*arguments)[0]
    else:
        output = _forward(*arguments)[0]
    if packed:
        output = output.reshape(len(output), heads, 1, -1)
    return output if output.dtype == returned else output.to(returned)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    mask: Tensor | None,
    scoring: Scoring,
    prefixes: Sequence[Prefix],
    heads_last: bool,
    *tensors: Tensor,
) -> tuple[Tensor, Tensor]:
    """Merged output and merged log-sum-exp."""
    whole = scoring.whole
    parts = [attend(Part(query, key, value, mask, scoring))]
    of_groups: dict[RowGroups, list[tuple[int, PrefixPart, Tensor, Tensor]]] = {}
    for prefix, prefix_key, prefix_value in zip(prefixes, tensors[0::2], tensors[1::2], strict=True):
        if isinstance(prefix, RowPrefixes):
            parts.append(_attend_by_row(prefix, query, prefix_key, prefix_value, whole))
        elif prefix.group is None:
            parts.append(_attend_shared(prefix, query, prefix_key, prefix_value, whole))
        else:
            groups, number = prefix.group
            of_groups.setdefault(groups, []).append((number, prefix, prefix_key, prefix_value))
    parts += [_attend_by_group(groups, members, query, whole) for groups, members in of_groups.items()]
    outputs, lses = zip(*parts, strict=True)
    return merge(outputs, lses, sinks, heads_last)


class _SharedPrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        mask: Tensor | None,
        scoring: Scoring,
        prefixes: Sequence[Prefix],
        heads_last: bool,
        *tensors: Tensor,
    ) -> Tensor:
        output, lse = _forward(query, key, value, sinks, mask, scoring, prefixes, heads_last, *tensors)
        # CPU kernels take the output as the merge gave it, which makes the small gradients of large scores exact.
        saved = output if query.device.type == "cpu" else output.to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, mask, saved, lse, *tensors)
        ctx.scoring, ctx.prefixes = scoring, prefixes
        return output.to(query.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return _backward(ctx, grad.contiguous())


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, sinks, mask, output, lse, *tensors = ctx.saved_tensors
    scoring = ctx.scoring
    wants_query, *wants_own = ctx.needs_input_grad[:3]
    own = Part(query, key, value, mask, scoring)
    d_query, d_key, d_value = attend_backward(own, grad, output, lse, (wants_query, *wants_own))
    whole = scoring.whole
    d_tensors: list[Tensor | None] = []
    for number, prefix in enumerate(ctx.prefixes):
        prefix_key, prefix_value = tensors[2 * number : 2 * number + 2]
        wanted = (wants_query, *ctx.needs_input_grad[8 + 2 * number : 10 + 2 * number])
        function: Callable[..., Gradients]
        function = _attend_shared_backward if isinstance(prefix, PrefixPart) else _attend_by_row_backward
        rows = prefix.rows if isinstance(prefix, PrefixPart) else None
        q, g, out, scores = (tensor if rows is None else tensor[rows] for tensor in (query, grad, output, lse))
        d_part, *d_prefix = function(prefix, q, prefix_key, prefix_value, whole, g, out, scores, wanted)
        d_tensors.extend(d_prefix)
        if d_query is not None and d_part is not None:
            if rows is None:
                d_query = d_query.add_(d_part)
            else:
                d_query = d_query.index_add_(0, rows, d_part.to(d_query.dtype))
    d_sinks = None
    if sinks is not None and ctx.needs_input_grad[3]:
        products = (sinks - lse).exp() * (grad * output).sum(-1)
        d_sinks = -products.sum_to_size(sinks.shape).to(sinks.dtype)
    return (
        *(_rounded(tensor, query.dtype) for tensor in (d_query, d_key, d_value)),
        *(d_sinks, None, None, None, None),
        *(_rounded(tensor, query.dtype) for tensor in d_tensors),
    )


def _rounded(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


# -- a prefix of all rows: one copy of keys and values, the whole batch as its queries ------------------------------


def _attend_shared(
    prefix: PrefixPart, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    folding = _Folding(query, key.shape[0], 1)
    output, lse = attend(folding.part(query, key, value, prefix.mask, scoring))
    return folding.undo(output), folding.undo(lse)


def _attend_by_group(
    groups: RowGroups, members: Sequence[tuple[int, PrefixPart, Tensor, Tensor]], query: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Of the prefixes of all or some of the groups, one for each; rows of no group get nothing."""
    queries = query[groups.order].split(groups.sizes)
    parts = [_attend_shared(prefix, queries[number], key, value, scoring) for number, prefix, key, value in members]
    output, lse = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if groups.places is not None and [number for number, *_ in members] == list(range(len(groups.sizes))):
        return output[groups.places], lse[groups.places]
    rows = torch.cat([groups.rows(number) for number, *_ in members])
    nothing = output.new_zeros(len(query), *output.shape[1:]), lse.new_full((len(query), *lse.shape[1:]), -torch.inf)
    return nothing[0].index_copy_(0, rows, output), nothing[1].index_copy_(0, rows, lse)


def _attend_shared_backward(
    prefix: PrefixPart,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    wanted: Wanted,
) -> Gradients:
    folding = _Folding(query, key.shape[0], _pseudo_batches(query, key))
    part = folding.part(query, key, value, prefix.mask, scoring)
    saved = (folding.do(output), folding.do(lse))
    d_query, d_key, d_value = attend_backward(part, folding.do(grad), *saved, wanted)
    return (
        None if d_query is None else folding.undo(d_query),
        None if d_key is None else d_key.sum(0),
        None if d_value is None else d_value.sum(0),
    )


@torch.compiler.assume_constant_result
def _num_threads() -> int:
    return torch.get_num_threads()


class _Folding:
    """`[batch, heads, q_len, dim]` to `[splits, heads, batch / splits * q_len, dim]` and back: the rows' queries as those
    of one row, or of a few.

    On CUDA nothing is copied where heads lie behind tokens in memory, as models have it. On a CPU the query heads of a
    group become queries, too (`[splits, kv_heads, batch / splits * groups * q_len, dim]`), for whose many attention
    to few heads is faster.
    """

    def __init__(self, query: Tensor, kv_heads: int, splits: int) -> None:
        batch, heads, q_len, _ = query.shape
        self.heads = heads if query.is_cuda else kv_heads
        self.splits, self.queries = splits, (batch // splits, heads // self.heads, q_len)

    def do(self, tensor: Tensor) -> Tensor:
        """Of `[batch, heads, q_len, dim]`, or without the last."""
        rows, groups, q_len = self.queries
        tensor = tensor.view(self.splits, rows, self.heads, groups, q_len, *tensor.shape[3:])
        return tensor.transpose(1, 2).reshape(self.splits, self.heads, rows * groups * q_len, *tensor.shape[5:])

    def undo(self, tensor: Tensor) -> Tensor:
        """The inverse; also of what has another first axis than `splits`."""
        rows, groups, q_len = self.queries
        tensor = tensor.view(-1, self.heads, rows, groups, q_len, *tensor.shape[3:]).transpose(1, 2)
        return tensor.reshape(len(tensor) * rows, self.heads * groups, q_len, *tensor.shape[5:])

    def part(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring) -> Part:
        """Of queries `[batch, heads, q_len, key_dim]` to keys and values `[kv_heads, num_tokens, dim]`."""
        if mask is not None:
            rows, groups, q_len = self.queries
            mask = (
                _narrowed(mask, query.dtype)
                .view(self.splits, 1, rows, 1, -1, key.shape[1])
                .expand(-1, -1, -1, groups, q_len, -1)
            )
            mask = mask.flatten(2, 4)
        key, value = (tensor.expand(self.splits, *tensor.shape) for tensor in (key, value))
        return Part(self.do(query), key, value, mask, scoring)


def _pseudo_batches(query: Tensor, key: Tensor) -> int:
    """Into how many batches the queries to one prefix are split for the backward, which works on the heads of a batch
    side by side but on the queries of a head one after another: so many that all processors have work."""
    batch, heads, kv_heads = query.shape[0], query.shape[1], key.shape[0]
    if query.is_cuda:
        blocks = heads * -(-key.shape[1] // _BLOCK_KEYS)
        enough = -(-_GPU_BLOCKS // blocks)
    else:
        threads = _num_threads()
        enough = threads if kv_heads % threads else 1
    return next((splits for splits in range(min(enough, batch), batch) if batch % splits == 0), batch)


# -- a prefix of its own for every row ------------------------------------------------------------------------------


def _attend_by_row(
    prefix: RowPrefixes, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    if prefix.index is None or prefix.mask is not None or len(key) * query.shape[2] > _PICKED_QUERIES:
        key, value = _of_rows(prefix, key), _of_rows(prefix, value)
        return attend(Part(query, key, value, _row_mask(prefix, query, prefix.index), scoring))
    folding, rows = _Folding(query, key.shape[1], 1), torch.arange(len(query), device=query.device)
    everyone = folding.do(query).expand(len(key), -1, -1, -1)
    output, lse = attend(Part(everyone, key, value, _row_mask(prefix, query, None), scoring))
    picked = prefix.index.clamp(min=0) * len(query) + rows
    # [num_prefixes, heads, rows * groups * q_len, dim] to [num_prefixes * rows, heads * groups, q_len, dim]
    output, lse = (folding.undo(tensor).index_select(0, picked) for tensor in (output, lse))
    return output, lse.masked_fill((prefix.index < 0).view(-1, 1, 1), float("-inf"))


def _attend_by_row_backward(
    prefix: RowPrefixes,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    wanted: Wanted,
) -> Gradients:
    mask = _row_mask(prefix, query, prefix.index)
    part = Part(query, _of_rows(prefix, key), _of_rows(prefix, value), mask, scoring)
    d_query, *gradients = attend_backward(part, grad, output, lse, wanted)
    if prefix.index is not None:
        index = prefix.index.clamp(min=0)
        for number, (tensor, like) in enumerate(zip(gradients, (key, value), strict=True)):
            if tensor is not None:
                gradients[number] = tensor.new_zeros(like.shape).index_add_(0, index, tensor)
    return d_query, *gradients  # type: ignore[return-value]


def _of_rows(prefix: RowPrefixes, tensor: Tensor) -> Tensor:
    """`[num_prefixes, …]` to `[batch, …]`."""
    return tensor if prefix.index is None else tensor.index_select(0, prefix.index.clamp(min=0))


def _row_mask(prefix: RowPrefixes, query: Tensor, index: Tensor | None) -> Tensor | None:
    """Additive, `[batch, 1, q_len | 1, num_tokens]`, or, without `index`, by prefix instead of by row."""
    mask = None if prefix.mask is None else _narrowed(prefix.mask, query.dtype).unsqueeze(1)
    if prefix.lengths is None and index is None:
        return mask
    num_tokens, lengths = prefix.key.shape[2], prefix.lengths
    if index is not None:
        lengths = index.new_full((), num_tokens) if lengths is None else _of_rows(prefix, lengths)
        lengths = torch.where(index < 0, 0, lengths)
    assert lengths is not None
    hidden = torch.arange(num_tokens, device=query.device) >= lengths.view(-1, 1, 1, 1)
    if mask is None:
        mask = query.new_zeros(hidden.shape)
    return mask.masked_fill(hidden, torch.finfo(query.dtype).min)


def _narrowed(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask in another dtype, whose lowest numbers stay finite."""
    if mask.dtype == dtype:
        return mask
    return mask.clamp(min=torch.finfo(dtype).min).to(dtype)


# -- the reference ---------------------------------------------------------------------------------------------------


def concatenated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[Prefix],
    *,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    scoring: Scoring,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same attention the plain way: prefixes expanded to every row and concatenated to its own keys and values.

    For debugging, for dropout on the attention weights, and as what the tests hold `shared_prefix_attention` against.

    Returns:
        The output, and the weights `[batch, num_heads, q_len, prefix tokens + kv_len]`.
    """
    batch, heads, q_len, _ = query.shape
    groups = heads // key.shape[1]
    hidden = torch.finfo(query.dtype).min
    key_parts, value_parts, masks = [], [], []
    for part in prefixes:
        if isinstance(part, RowPrefixes):
            key_parts.append(_of_rows(part, part.key))
            value_parts.append(_of_rows(part, part.value))
            seen = _row_mask(part, query, part.index)
            num_tokens = part.key.shape[2]
            masks.append(query.new_zeros(batch, 1, q_len, num_tokens) if seen is None else seen)
            continue
        num_tokens = part.key.shape[1]
        key_parts.append(part.key.expand(batch, *part.key.shape))
        value_parts.append(part.value.expand(batch, *part.value.shape))
        seen = query.new_zeros(1, q_len, num_tokens) if part.mask is None else part.mask.to(query.dtype)
        if part.group is not None:
            of_some = query.new_full((batch, q_len, num_tokens), hidden)
            of_some[part.rows] = seen
            seen = of_some
        masks.append(seen[:, None])
    own = query.new_zeros(batch, 1, q_len, key.shape[2]) if mask is None else mask.expand(batch, -1, q_len, -1)
    if scoring.causal:
        own = own.masked_fill(torch.ones(own.shape[-2:], dtype=torch.bool, device=own.device).triu(1), hidden)
    masks = [part.expand(batch, own.shape[1], q_len, -1) for part in masks]
    keys, values = torch.cat([*key_parts, key], dim=2), torch.cat([*value_parts, value], dim=2)
    scores = query @ repeat_heads(keys, groups).transpose(-1, -2) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores + torch.cat([*masks, own], dim=-1)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[None, :, None, None].expand(batch, -1, q_len, 1)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
    weights = (weights if sinks is None else weights[..., :-1]).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, training=dropout > 0)
    return weights @ repeat_heads(values, groups), weights
