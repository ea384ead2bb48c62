"""A bfloat16 attention part by matrix products over tiles of scores, for CPUs with AVX512-BF16 but no AMX.

PyTorch's flash attention multiplies bfloat16 at float32's speed there; oneDNN's plain products do not. Scores, and the
gradients of weights, are products in float32, since rounding them would show; the weights made of them are rounded where
flash attention rounds them, so the result is as close to the exact one as flash attention's. Scores of a tile are in bits
(`BITS` says why).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from .plain_attention import BITS, Gradients, Part, Wanted

# Scores of a tile: in float32, they stay in a core's second-level cache.
_SCORES = 1 << 19
# Rows' own part. Beyond the longest, the half of the products that the causal mask throws away cost more than flash
# attention's slowness.
_SHORTEST, _LONGEST = 16, 1024
# Below this many scores a head, one flash call is faster than several products.
_FEWEST_SCORES = 1 << 15


def takes(part: Part, backward: bool) -> bool:
    """Whether products are faster than flash attention for this part on this machine."""
    query, key, _, mask, scoring = part
    q_len, kv_len = query.shape[2], key.shape[2]
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or mask is not None or scoring.softcap is not None:
        return False
    if torch.compiler.is_compiling() or not _pays():
        return False
    if scoring.causal:
        return _SHORTEST <= q_len == kv_len <= _LONGEST
    return q_len * part.groups * kv_len >= _FEWEST_SCORES


@functools.cache
def _pays() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not torch.cpu.get_capabilities().get("amx_bf16", False)


def attend(part: Part) -> tuple[Tensor, Tensor]:
    """Output `[batch, heads, q_len, value_dim]`, float32, and log-sum-exp `[batch, heads, q_len]`."""
    query, value = _by_kv_head(part.query, part), _by_kv_head(part.value, part)
    scaled = query.float().mul_(part.scoring.scale * BITS)
    keys = _by_kv_head(part.key, part).float().transpose(1, 2)
    output = scaled.new_empty(*query.shape[:2], value.shape[-1])
    lse = scaled.new_empty(query.shape[:2])
    q_len = part.query.shape[2]
    hidden = scaled.new_full((q_len, q_len), float("-inf")).triu_(1) if part.scoring.causal else None
    for heads, rows in _tiles(part):
        scores = scaled[heads, rows] @ keys[heads]
        if hidden is not None:
            scores.view(-1, q_len, q_len).add_(hidden)
        highest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(highest).exp2_()
        total = weights.sum(-1, keepdim=True)
        output[heads, rows] = (weights.to(value.dtype) @ value[heads]).float().div_(total)
        lse[heads, rows] = total.log2_().add_(highest).div_(BITS)[..., 0]
    return output.reshape(*part.query.shape[:3], -1), lse.reshape(part.query.shape[:3])


def attend_backward(part: Part, grad: Tensor, output: Tensor, lse: Tensor, wanted: Wanted) -> Gradients:
    """Gradients of query, key and value, float32, `None` where not `wanted`; `output` and `lse` may be those of a merged
    attention."""
    scale, q_len = part.scoring.scale, part.query.shape[2]
    delta = (grad.float() * output.float()).sum(-1, keepdim=True)
    # One more column in each product subtracts what all of a row's scores are less by.
    scaled = _by_kv_head(torch.cat([part.query.float() * scale, -lse[..., None].float()], -1).mul_(BITS), part)
    wide_grad = _by_kv_head(torch.cat([grad.float(), -delta], -1), part)
    keys, values = (_with_ones(_by_kv_head(tensor, part)).transpose(1, 2) for tensor in (part.key, part.value))
    query, grad, key = (_by_kv_head(tensor, part) for tensor in (part.query, grad, part.key))
    d_query = torch.empty(query.shape, dtype=torch.float32)
    d_key = torch.zeros(key.shape, dtype=torch.float32)
    d_value = torch.zeros(*key.shape[:2], grad.shape[-1], dtype=torch.float32)
    for heads, rows in _tiles(part):
        weights = (scaled[heads, rows] @ keys[heads]).exp2_()
        if part.scoring.causal:  # there may be infinities behind the diagonal: not by a product
            weights.view(-1, q_len, q_len).tril_()
        if wanted[2]:
            d_value[heads] += weights.to(grad.dtype).transpose(1, 2) @ grad[heads, rows]
        if wanted[0] or wanted[1]:
            d_scores = (wide_grad[heads, rows] @ values[heads]).mul_(weights).to(query.dtype)
            if wanted[0]:
                d_query[heads, rows] = d_scores @ key[heads]
            if wanted[1]:
                d_key[heads] += d_scores.transpose(1, 2) @ query[heads, rows]
    found = (d_query.mul_(scale), d_key.mul_(scale), d_value)
    return tuple(  # type: ignore[return-value]
        tensor.reshape(like.shape) if want else None for tensor, like, want in zip(found, part[:3], wanted, strict=True)
    )


def _by_kv_head(tensor: Tensor, part: Part) -> Tensor:
    """`[batch, heads, length, dim]` to `[batch * kv_heads, heads / kv_heads * length, dim]`: the query heads of a group
    are queries of one key/value head."""
    return tensor.reshape(part.key.shape[0] * part.key.shape[1], -1, tensor.shape[-1])


def _with_ones(tensor: Tensor) -> Tensor:
    wide = torch.ones(*tensor.shape[:2], tensor.shape[2] + 1, dtype=torch.float32)
    wide[..., :-1] = tensor
    return wide


def _tiles(part: Part) -> Iterator[tuple[slice, slice]]:
    """Key/value heads of all batch rows, and rows of their queries; under a causal mask, all rows at once."""
    pairs, num_rows = part.key.shape[0] * part.key.shape[1], part.groups * part.query.shape[2]
    kv_len = part.key.shape[2]
    step = max(1, _SCORES // (num_rows * kv_len))
    row_step = num_rows if part.scoring.causal else min(num_rows, max(1, _SCORES // kv_len))
    for first in range(0, pairs, step):
        for row in range(0, num_rows, row_step):
            yield slice(first, first + step), slice(row, row + row_step)
