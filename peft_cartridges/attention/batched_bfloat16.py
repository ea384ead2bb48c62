"""The rows' own causal part in bfloat16 on CPUs, as batched matrix products over batch rows and key/value heads.

For the reason that `tiled_bfloat16` has, and by its way of keeping precision: each product already subtracts what makes
the scores that count small. The query heads of a group are queries of one key/value head here, so keys and values are
not repeated, and their gradients come out summed over the group.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Scores worked on at a time: a few megabytes, which stay in the processor's cache.
_SCORES = 1 << 21
# Beyond this length half of the products, which the causal mask throws away, cost more than flash attention's slowness.
_LONGEST = 1024


def is_faster(query: Tensor, key: Tensor) -> bool:
    """Whether it pays for these rows on this machine."""
    return (
        query.dtype == key.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and 16 <= query.shape[2] == key.shape[2] <= _LONGEST
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and not torch.compiler.is_compiling()
    )


def attend_causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output `[batch, heads, q_len, value_dim]` and log-sum-exp `[batch, heads, q_len]` of causal attention.

    Args:
        query: `[batch, heads, q_len, key_dim]`.
        key, value: `[batch, kv_heads, q_len, key_dim | value_dim]`.
        scale: Of the scores.
    """
    batch, heads, q_len, _ = query.shape
    query, key, value = _by_kv_head(query, key), _by_kv_head(key, key), _by_kv_head(value, key)
    output, lse = query.new_empty(*query.shape[:2], value.shape[-1]), torch.empty(query.shape[:2])
    hidden = query.new_full((q_len, q_len), float("-inf")).triu(1).repeat(query.shape[1] // q_len, 1)
    for pairs in _pieces(query, key):
        q, transposed = query[pairs], key[pairs].transpose(1, 2)
        scores = torch.baddbmm(hidden, q, transposed, alpha=scale)
        highest = scores.amax(-1, keepdim=True)
        scores = _causal(torch.baddbmm(highest.neg(), q, transposed, alpha=scale, out=scores).exp_())
        total = scores.sum(-1, dtype=torch.float32)
        output[pairs] = (scores @ value[pairs]).float().div_(total[..., None])
        lse[pairs] = total.log_().add_(highest[..., 0].float())
    return output.reshape(batch, heads, q_len, -1), lse.reshape(batch, heads, q_len)


def attend_causal_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; `output` and `lse` may be those of a merged attention."""
    shapes = [tensor.shape for tensor in (query, key, value)]
    lse = _by_kv_head(lse[..., None], key)
    query, grad, output = (_by_kv_head(tensor, key) for tensor in (query, grad, output))
    value, key = _by_kv_head(value, key), _by_kv_head(key, key)
    d_query, d_key, d_value = (torch.empty_like(tensor) for tensor in (query, key, value))
    rounded = lse.to(query.dtype)
    # The products subtract the rounded log-sum-exp; what that leaves is a factor of the whole row.
    factor = (rounded.float() - lse).exp()
    for pairs in _pieces(query, key):
        q, g, row_factor = query[pairs], grad[pairs].float(), factor[pairs]
        delta = (g * output[pairs].float()).sum(-1, keepdim=True).to(query.dtype)
        scaled = g.mul_(row_factor).to(query.dtype)
        g = grad[pairs]
        weights = torch.baddbmm(rounded[pairs].neg(), q, key[pairs].transpose(1, 2), alpha=scale).exp_()
        weights = _causal(weights)
        d_value[pairs] = weights.transpose(1, 2) @ scaled
        d_scores = torch.baddbmm(delta.neg(), g, value[pairs].transpose(1, 2)).mul_(weights)
        row_factor = row_factor * scale
        d_query[pairs] = (d_scores @ key[pairs]).float().mul_(row_factor)
        d_key[pairs] = d_scores.transpose(1, 2) @ q.float().mul_(row_factor).to(q.dtype)
    return tuple(tensor.reshape(shape) for tensor, shape in zip((d_query, d_key, d_value), shapes, strict=True))  # type: ignore[return-value]


def _by_kv_head(tensor: Tensor, key: Tensor) -> Tensor:
    """`[batch, heads, length, dim]` to `[batch * kv_heads, heads / kv_heads * length, dim]`."""
    return tensor.reshape(key.shape[0] * key.shape[1], -1, tensor.shape[-1])


def _causal(scores: Tensor) -> Tensor:
    """With 0, in place, where the key is behind the query: there may be infinities there, so not by a product."""
    length = scores.shape[-1]
    scores.view(-1, length, length).tril_()
    return scores


def _pieces(query: Tensor, key: Tensor) -> Iterator[slice]:
    step = max(1, _SCORES // (query.shape[1] * key.shape[1]))
    for start in range(0, len(query), step):
        yield slice(start, start + step)
