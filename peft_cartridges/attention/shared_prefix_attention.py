"""Attention to prefixes that the rows of a batch share, exactly, with its own backward.

    softmax([q·K_prefix, q·K]) [V_prefix; V]  =  merge(attend(q, K_prefix, V_prefix), attend(q, K, V))

The batch and the query heads of one key/value group are folded into the query axis of the prefix part, so all rows
meet one copy of the prefix in one product, and nothing of size batch x prefix is stored. Parts are merged by their
log-sum-exp; each part's backward runs with the merged output and log-sum-exp, which is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .kernels import attend, attend_backward, repeat_heads
from .plain_attention import Scoring


@dataclass(frozen=True)
class PrefixPart:
    """A prefix in one attention layer, and who sees it.

    Args:
        key: `[num_key_value_heads, num_tokens, key_dim]`.
        value: `[num_key_value_heads, num_tokens, value_dim]`.
        mask: Additive, `[rows, q_len, num_tokens]`; `None` where every query sees every token.
        rows: Indices `[rows]` of the batch rows that see this prefix; `None` means all.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    rows: Tensor | None = None


def shared_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[PrefixPart],
    *,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    scoring: Scoring,
) -> Tensor:
    """Attention of every row to its prefixes and to its own keys and values.

    Args:
        query: `[batch, num_heads, q_len, key_dim]`.
        key, value: The rows' own, `[batch, num_key_value_heads, kv_len, key_dim | value_dim]`.
        prefixes: The shared parts.
        mask: Additive mask of the rows' own part, broadcastable to `[batch, num_heads, q_len, kv_len]`.
        sinks: Learned scores `[num_heads]` that take part in the softmax and carry no value (GPT-OSS).
        scoring: Scale, soft cap, and whether the rows' own part is causal (with `mask` then `None`).

    Returns:
        `[batch, num_heads, q_len, value_dim]`, in the dtype of `query`.
    """
    tensors = [tensor for part in prefixes for tensor in (part.key, part.value)]
    about = [(part.mask, part.rows) for part in prefixes]
    inputs = (query, key, value, *tensors) + (() if sinks is None else (sinks,))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _SharedPrefixAttention.apply(query, key, value, sinks, mask, scoring, about, *tensors)
    return _forward(query, key, value, sinks, mask, scoring, about, tensors)[0]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    mask: Tensor | None,
    scoring: Scoring,
    about: Sequence[tuple[Tensor | None, Tensor | None]],
    tensors: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Merged output and merged log-sum-exp."""
    output, lse = _attend_rows(query, key, value, mask, scoring)
    outputs, lses = [output], [lse]
    for (part_mask, rows), part_key, part_value in zip(about, tensors[0::2], tensors[1::2], strict=True):
        part_query = query if rows is None else query[rows]
        part_output, part_lse = _attend_prefix(part_query, part_key, part_value, part_mask, scoring)
        if rows is not None:
            part_output = torch.zeros_like(output).index_copy_(0, rows, part_output)
            part_lse = torch.full_like(lse, float("-inf")).index_copy_(0, rows, part_lse)
        outputs.append(part_output)
        lses.append(part_lse)
    if len(lses) == 2 and sinks is None:
        # The second part's weight is exp(lse2) / (exp(lse1) + exp(lse2)).
        weight = (lses[1] - lses[0]).sigmoid_()[..., None].to(query.dtype)
        one, other = (part.to(query.dtype) for part in outputs)  # autocast may have rounded them
        return torch.lerp(one, other, weight), torch.logaddexp(lses[0], lses[1])
    extra = [] if sinks is None else [sinks.to(lse.dtype)[None, :, None].expand_as(lse)]
    merged_lse = torch.stack([*lses, *extra]).logsumexp(0)
    # In the queries' dtype: products of two dtypes are several times slower on a CPU, and more exact by no more than
    # what the result is rounded to.
    weights = [(part_lse - merged_lse).exp()[..., None].to(query.dtype) for part_lse in lses]
    merged = outputs[0] * weights[0]
    for part_output, weight in zip(outputs[1:], weights[1:], strict=True):
        merged.addcmul_(part_output, weight)
    return merged, merged_lse


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
        about: Sequence[tuple[Tensor | None, Tensor | None]],
        *tensors: Tensor,
    ) -> Tensor:
        output, lse = _forward(query, key, value, sinks, mask, scoring, about, tensors)
        ctx.save_for_backward(query, key, value, sinks, mask, output, lse, *tensors)
        ctx.scoring, ctx.about = scoring, about
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, mask, output, lse, *tensors = ctx.saved_tensors
        grad = grad.contiguous()
        d_query, d_key, d_value = attend_backward(grad, query, key, value, output, lse, mask, ctx.scoring)
        d_tensors: list[Tensor] = []
        for (part_mask, rows), part_key, part_value in zip(ctx.about, tensors[0::2], tensors[1::2], strict=True):
            g, q, out, total = (t if rows is None else t[rows] for t in (grad, query, output, lse))
            d_part, *d_prefix = _attend_prefix_backward(g, q, out, total, part_key, part_value, part_mask, ctx.scoring)
            d_query = d_query + d_part if rows is None else d_query.index_add(0, rows, d_part)
            d_tensors.extend(d_prefix)
        d_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            weight = (sinks[None, :, None] - lse).exp()
            d_sinks = -(weight * (grad * output).sum(-1)).sum((0, 2)).to(sinks.dtype)
        return d_query, d_key, d_value, d_sinks, None, None, None, *d_tensors


# -- the rows' own part ----------------------------------------------------------------------------------------------


def _attend_rows(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    batch, heads, q_len, _ = query.shape
    groups = heads // key.shape[1]
    if q_len == 1 and groups > 1 and (mask is None or mask.shape[1] == 1):
        # One query per row: the heads of a group are as good as that many queries, and nothing needs repeating.
        packed = query.reshape(batch, key.shape[1], groups, -1)
        output, lse = attend(packed, key, value, mask, Scoring(scoring.scale, scoring.softcap))
        return output.reshape(batch, heads, 1, -1), lse.reshape(batch, heads, 1)
    return attend(query, key, value, mask, scoring)


# -- the prefix part: one copy of keys and values, the whole batch as its queries ------------------------------------


def _attend_prefix(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    batch, heads, q_len, _ = query.shape
    kv_heads = key.shape[0]
    whole = Scoring(scoring.scale, scoring.softcap)
    output, lse = attend(_fold(query, kv_heads), key[None], value[None], _fold_mask(mask, heads // kv_heads), whole)
    return _unfold(output, batch, heads, q_len), _unfold(lse[..., None], batch, heads, q_len).squeeze(-1)


def _attend_prefix_backward(
    grad: Tensor,
    query: Tensor,
    output: Tensor,
    lse: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, q_len, _ = query.shape
    kv_heads = key.shape[0]
    d_query, d_key, d_value = attend_backward(
        _fold(grad, kv_heads),
        _fold(query, kv_heads),
        key[None],
        value[None],
        _fold(output, kv_heads),
        _fold(lse[..., None], kv_heads).squeeze(-1),
        _fold_mask(mask, heads // kv_heads),
        Scoring(scoring.scale, scoring.softcap),
    )
    return _unfold(d_query, batch, heads, q_len), d_key[0], d_value[0]


def _fold(tensor: Tensor, kv_heads: int) -> Tensor:
    """`[batch, heads, q_len, dim]` to `[1, kv_heads, groups * batch * q_len, dim]`."""
    folded = tensor.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3, 4)
    return folded.reshape(1, kv_heads, -1, tensor.shape[-1])


def _unfold(tensor: Tensor, batch: int, heads: int, q_len: int) -> Tensor:
    """The inverse of `_fold`."""
    kv_heads = tensor.shape[1]
    return tensor.reshape(kv_heads, heads // kv_heads, batch, q_len, -1).permute(2, 0, 1, 3, 4).flatten(1, 2)


def _fold_mask(mask: Tensor | None, groups: int) -> Tensor | None:
    """`[batch, q_len, num_tokens]` to `[1, 1, groups * batch * q_len, num_tokens]`."""
    return None if mask is None else mask.flatten(0, 1).repeat(groups, 1)[None, None]


# -- the reference ---------------------------------------------------------------------------------------------------


def concatenated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[PrefixPart],
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
        num_tokens = part.key.shape[1]
        key_parts.append(part.key.expand(batch, *part.key.shape))
        value_parts.append(part.value.expand(batch, *part.value.shape))
        seen = query.new_zeros(batch, q_len, num_tokens)
        if part.rows is not None:
            seen = seen.fill_(hidden).index_fill_(0, part.rows, 0.0)
        if part.mask is not None:
            rows = slice(None) if part.rows is None else part.rows
            seen[rows] = part.mask.to(seen.dtype)
        masks.append(seen[:, None])
    own = query.new_zeros(batch, 1, q_len, key.shape[2]) if mask is None else mask.expand(batch, -1, q_len, -1)
    if scoring.causal:
        own = own.masked_fill(torch.ones(own.shape[-2:], dtype=torch.bool, device=own.device).triu(1), hidden)
    masks = [part.expand(batch, own.shape[1], -1, -1) for part in masks]
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
