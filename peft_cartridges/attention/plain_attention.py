"""An attention part by plain PyTorch: any device, any dtype, soft-capped scores, values of another width."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Scores held at a time, so that memory stays flat in the number of queries.
_SCORES = 1 << 24
# In a nat. On CPUs, `exp` takes up to a hundred times as long where a score is so far below the highest that nothing comes
# of it, as masked ones are; `exp2` does not.
BITS = 1 / math.log(2)

Wanted = tuple[bool, bool, bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Scoring:
    """How a part's scores are made: `scale * q·k`, squashed to `softcap * tanh(scores / softcap)` if given (Gemma 2),
    plus an additive `mask` broadcastable to `[batch, heads, q_len, kv_len]`; `causal` hides key j from query i < j."""

    scale: float
    softcap: float | None = None
    causal: bool = False

    @property
    def whole(self) -> Scoring:
        """The same without causality."""
        return Scoring(self.scale, self.softcap) if self.causal else self


class Part(NamedTuple):
    """What one part of an attention is computed from, all of one dtype.

    Args:
        query: `[batch, heads, q_len, key_dim]`.
        key, value: `[batch, kv_heads, kv_len, key_dim | value_dim]`; `kv_heads` divides `heads`.
        mask: Additive, broadcastable to `[batch, heads, q_len, kv_len]`.
        scoring: How scores are made.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scoring: Scoring

    @property
    def groups(self) -> int:
        """Query heads for each key/value head."""
        return self.query.shape[1] // self.key.shape[1]


def attend_plainly(part: Part) -> tuple[Tensor, Tensor]:
    """Output `[batch, heads, q_len, value_dim]` and log-sum-exp `[batch, heads, q_len]`."""
    outputs, lses = [], []
    value = repeat_heads(part.value, part.groups)
    for rows in _query_pieces(part):
        scores, _ = _scores(part, rows)
        highest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(highest).mul_(BITS).exp2_()
        total = weights.sum(-1, keepdim=True)
        lses.append(total.log().add_(highest)[..., 0])
        outputs.append(weights.div_(total).to(value.dtype) @ value)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


def attend_plainly_backward(part: Part, grad: Tensor, output: Tensor, lse: Tensor, wanted: Wanted) -> Gradients:
    """Gradients of query, key and value, `None` where not `wanted`."""
    query, key, value, _, scoring = part
    accumulate = accumulation_dtype(query)
    wide_key, wide_value = (repeat_heads(tensor.to(accumulate), part.groups) for tensor in (key, value))
    d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(wide_key), torch.zeros_like(wide_value)
    for rows in _query_pieces(part):
        q, g, out = (tensor[:, :, rows].to(accumulate) for tensor in (query, grad, output))
        scores, d_softcap = _scores(part, rows)
        weights = scores.sub_(lse[:, :, rows, None].to(accumulate)).mul_(BITS).exp2_()
        if wanted[2]:
            d_value += weights.transpose(-1, -2) @ g
        if not (wanted[0] or wanted[1]):
            continue
        d_scores = weights * (g @ wide_value.transpose(-1, -2) - (g * out).sum(-1, keepdim=True))
        if d_softcap is not None:
            d_scores = d_scores * d_softcap
        if wanted[0]:
            d_query[:, :, rows] = (d_scores @ wide_key * scoring.scale).to(query.dtype)
        if wanted[1]:
            d_key += d_scores.transpose(-1, -2) @ q * scoring.scale
    return (
        d_query if wanted[0] else None,
        sum_groups(d_key, part.groups).to(key.dtype) if wanted[1] else None,
        sum_groups(d_value, part.groups).to(value.dtype) if wanted[2] else None,
    )


def repeat_heads(tensor: Tensor, groups: int) -> Tensor:
    """`[batch, kv_heads, …]` to `[batch, kv_heads * groups, …]`, as query heads are ordered."""
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def sum_groups(tensor: Tensor, groups: int) -> Tensor:
    """The gradient of `repeat_heads`."""
    return tensor if groups == 1 else tensor.unflatten(1, (-1, groups)).sum(2)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """What sums over tensors of this dtype are held in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _scores(part: Part, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Scores of some queries in the accumulation dtype, and the derivative of the soft cap where there is one."""
    query, key, _, mask, scoring = part
    accumulate = accumulation_dtype(query)
    key = repeat_heads(key.to(accumulate), part.groups)
    scores = query[:, :, rows].to(accumulate) @ key.transpose(-1, -2) * scoring.scale
    d_softcap = None
    if scoring.softcap is not None:
        squashed = torch.tanh(scores / scoring.softcap)
        scores, d_softcap = scoring.softcap * squashed, 1 - squashed.square()
    if mask is not None:
        scores = scores + (mask if mask.shape[-2] == 1 else mask[..., rows, :])
    if scoring.causal:
        q_len, kv_len = scores.shape[-2:]
        hidden = torch.ones(q_len, kv_len, dtype=torch.bool, device=scores.device).triu(rows.start + 1)
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return scores, d_softcap


def _query_pieces(part: Part) -> list[slice]:
    batch, heads, q_len, _ = part.query.shape
    step = max(1, _SCORES // max(1, batch * heads * part.key.shape[2]))
    return [slice(start, min(start + step, q_len)) for start in range(0, q_len, step)]
