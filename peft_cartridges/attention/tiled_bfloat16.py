"""A bfloat16 attention part for CPUs by tiles of plain matrix products.

PyTorch's flash attention on CPU multiplies bfloat16 at float32's speed unless the processor has AMX; oneDNN's plain
products use AVX512-BF16 too. Their result is rounded to bfloat16, which would spoil scores of some size, so each
product already subtracts the row's maximum (forward) or its log-sum-exp (backward): scores near the maximum, which are
the ones with weight, are then near zero and keep their precision. The error is of the size of flash attention's own
(see tests/attention/test_tiled_bfloat16.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Query rows of a tile: with a few thousand keys its scores stay in a core's second-level cache.
_ROWS = 512
# Up to this many rows (decoding) and scores, those of all heads are one tile.
_FEW_ROWS, _FEW_SCORES = 256, 1 << 22
# Below this many scores a head, one flash call is faster than several products.
_FEWEST_SCORES = 1 << 15


def is_faster(query: Tensor, key: Tensor) -> bool:
    """Whether products pay for these shapes on this machine."""
    return (
        query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and query.shape[2] * key.shape[2] >= _FEWEST_SCORES
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and not torch.compiler.is_compiling()
    )


def attend_tiled(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output `[batch, heads, q_len, value_dim]` and log-sum-exp `[batch, heads, q_len]` of unmasked attention."""
    batch, heads, q_len, _ = query.shape
    if q_len <= _FEW_ROWS and batch * heads * q_len * key.shape[2] <= _FEW_SCORES:
        return _attend_at_once(query, key, value, scale)
    output = query.new_empty(batch, heads, q_len, value.shape[-1])
    lse = torch.empty(batch, heads, q_len)
    buffer = query.new_empty(min(_ROWS, q_len), key.shape[2])
    for b, h, rows in _tiles(query):
        q, transposed = query[b, h, rows], key[b, h].t()
        scores = torch.mm(q, transposed, out=buffer[: len(q)])
        highest = scores.amax(-1, keepdim=True).mul_(scale)
        torch.addmm(highest.neg(), q, transposed, alpha=scale, out=scores)
        total = scores.exp_().sum(-1, dtype=torch.float32)
        output[b, h, rows] = (scores @ value[b, h]).float().div_(total[:, None])
        lse[b, h, rows] = total.log_().add_(highest[:, 0].float())
    return output, lse


def _attend_at_once(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (tensor.flatten(0, 1) for tensor in (query, key, value))
    transposed = k.transpose(1, 2)
    scores = q @ transposed
    highest = scores.amax(-1, keepdim=True).mul_(scale)
    torch.baddbmm(highest.neg(), q, transposed, alpha=scale, out=scores)
    total = scores.exp_().sum(-1, dtype=torch.float32)
    output = (scores @ v).float().div_(total[..., None]).to(query.dtype)
    lse = total.log_().add_(highest[..., 0].float())
    return output.unflatten(0, query.shape[:2]), lse.unflatten(0, query.shape[:2])


def attend_tiled_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; `output` and `lse` may be those of a merged attention."""
    d_query = torch.empty_like(query)
    d_key = torch.zeros(key.shape, dtype=torch.float32)
    d_value = torch.zeros(value.shape, dtype=torch.float32)
    buffer = query.new_empty(2, min(_ROWS, query.shape[2]), key.shape[2])
    delta = (grad.float() * output.float()).sum(-1, keepdim=True).to(query.dtype).neg()
    rounded = lse.to(query.dtype)
    # The products subtract the rounded log-sum-exp; what that leaves is a factor of the whole row.
    factor = (rounded.float() - lse).exp()[..., None]
    for b, h, rows in _tiles(query):
        q, g, row_factor = query[b, h, rows], grad[b, h, rows], factor[b, h, rows]
        weights, d_scores = buffer[0, : len(q)], buffer[1, : len(q)]
        torch.addmm(rounded[b, h, rows, None].neg(), q, key[b, h].t(), alpha=scale, out=weights)
        weights.exp_()
        d_value[b, h] += weights.t() @ g.float().mul_(row_factor).to(query.dtype)
        torch.addmm(delta[b, h, rows], g, value[b, h].t(), out=d_scores)
        d_scores.mul_(weights)
        d_query[b, h, rows] = (d_scores @ key[b, h]).float().mul_(row_factor * scale)
        d_key[b, h] += d_scores.t() @ q.float().mul_(row_factor * scale).to(query.dtype)
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype)


def _tiles(query: Tensor) -> list[tuple[int, int, slice]]:
    batch, heads, q_len, _ = query.shape
    starts = range(0, q_len, _ROWS)
    return [(b, h, slice(s, min(s + _ROWS, q_len))) for b in range(batch) for h in range(heads) for s in starts]
