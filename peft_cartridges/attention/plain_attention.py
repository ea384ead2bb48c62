"""An attention part by plain PyTorch: any device, any dtype, soft-capped scores, values of another width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Scores held at a time, so that memory stays flat in the number of queries.
_SCORES = 1 << 24


@dataclass(frozen=True)
class Scoring:
    """How a part's scores are made: `scale * q·k`, squashed to `softcap * tanh(scores / softcap)` if given (Gemma 2),
    plus an additive `mask` broadcastable to `[batch, heads, q_len, kv_len]`; `causal` hides key j from query i < j."""

    scale: float
    softcap: float | None = None
    causal: bool = False


def attend_plainly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    outputs, lses = [], []
    for rows in _query_pieces(query, key):
        scores, _ = _scores(query[:, :, rows], key, _rows_of(mask, rows), scoring, rows.start)
        lse = scores.logsumexp(-1)
        lses.append(lse)
        outputs.append((scores - lse[..., None]).exp().to(value.dtype) @ value)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


def attend_plainly_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor]:
    accumulate = _accumulation_dtype(query)
    d_query = torch.empty_like(query)
    d_key = torch.zeros(key.shape, dtype=accumulate, device=key.device)
    d_value = torch.zeros(value.shape, dtype=accumulate, device=value.device)
    for rows in _query_pieces(query, key):
        q, g, out = (tensor[:, :, rows].to(accumulate) for tensor in (query, grad, output))
        scores, d_softcap = _scores(q, key, _rows_of(mask, rows), scoring, rows.start)
        weights = (scores - lse[:, :, rows, None].to(accumulate)).exp()
        d_value += weights.transpose(-1, -2) @ g
        d_scores = weights * (g @ value.to(accumulate).transpose(-1, -2) - (g * out).sum(-1, keepdim=True))
        if d_softcap is not None:
            d_scores = d_scores * d_softcap
        d_query[:, :, rows] = (d_scores @ key.to(accumulate) * scoring.scale).to(query.dtype)
        d_key += d_scores.transpose(-1, -2) @ q * scoring.scale
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype)


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, scoring: Scoring, first_row: int
) -> tuple[Tensor, Tensor | None]:
    """Scores in the accumulation dtype, and the derivative of the soft cap where there is one."""
    accumulate = _accumulation_dtype(query)
    scores = query.to(accumulate) @ key.to(accumulate).transpose(-1, -2) * scoring.scale
    d_softcap = None
    if scoring.softcap is not None:
        squashed = torch.tanh(scores / scoring.softcap)
        scores, d_softcap = scoring.softcap * squashed, 1 - squashed.square()
    if mask is not None:
        scores = scores + mask
    if scoring.causal:
        q_len, kv_len = scores.shape[-2:]
        hidden = torch.ones(q_len, kv_len, dtype=torch.bool, device=scores.device).triu(first_row + 1)
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return scores, d_softcap


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _query_pieces(query: Tensor, key: Tensor) -> list[slice]:
    batch, heads, q_len, _ = query.shape
    step = max(1, _SCORES // max(1, batch * heads * key.shape[2]))
    return [slice(start, min(start + step, q_len)) for start in range(0, q_len, step)]


def _rows_of(mask: Tensor | None, rows: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :]
