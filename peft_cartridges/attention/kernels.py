"""One part of an attention and its log-sum-exp, forward and backward: what `shared_prefix_attention` merges.

Every kernel computes, for queries `[batch, heads, q_len, key_dim]`, keys `[batch, kv_heads, kv_len, key_dim]` and values
`[batch, kv_heads, kv_len, value_dim]`, the output `[batch, heads, q_len, value_dim]` and the log-sum-exp of the scores
`[batch, heads, q_len]`; `kv_heads` divides `heads`. The backward takes any output and log-sum-exp: given those of a
*merged* attention it returns this part's share of the merged gradient (the identity that ring attention rests on,
arXiv 2310.01889).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import batched_bfloat16, fused_cuda, tiled_bfloat16
from .plain_attention import Scoring, attend_plainly, attend_plainly_backward

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one part."""
    if _tiles_pay(query, key, value, mask, scoring):
        return tiled_bfloat16.attend_tiled(query, key, value, scoring.scale)
    if _batches_pay(query, key, value, mask, scoring):
        return batched_bfloat16.attend_causal(query, key, value, scoring.scale)
    if fused_cuda.flash_takes(query, key, value, mask, scoring):
        return fused_cuda.attend_flash(query, key, value, scoring)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_heads(key, groups), repeat_heads(value, groups)
    if _has_flash_cpu(query, key, value, scoring):
        return _flash_cpu(query, key, value, 0.0, scoring.causal, attn_mask=mask, scale=scoring.scale)
    if fused_cuda.efficient_takes(query, key, value, scoring):
        return fused_cuda.attend_efficient(query, key, value, mask, scoring)
    return attend_plainly(query, key, value, mask, scoring)


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, for an output and log-sum-exp that may be those of a merged attention."""
    if _tiles_pay(query, key, value, mask, scoring):
        return tiled_bfloat16.attend_tiled_backward(grad, query, key, value, output, lse, scoring.scale)
    if _batches_pay(query, key, value, mask, scoring):
        return batched_bfloat16.attend_causal_backward(grad, query, key, value, output, lse, scoring.scale)
    if fused_cuda.flash_takes(query, key, value, mask, scoring):
        return fused_cuda.attend_flash_backward(grad, query, key, value, output, lse, scoring)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_heads(key, groups), repeat_heads(value, groups)
    parts = (grad, query, key, value, output, lse)
    if _has_flash_cpu(query, key, value, scoring):
        gradients = _flash_cpu_backward(*parts, 0.0, scoring.causal, attn_mask=mask, scale=scoring.scale)
    elif fused_cuda.efficient_takes(query, key, value, scoring):
        gradients = fused_cuda.attend_efficient_backward(*parts, mask, scoring)
    else:
        gradients = attend_plainly_backward(*parts, mask, scoring)
    d_query, d_key, d_value = gradients
    return d_query, _sum_groups(d_key, groups), _sum_groups(d_value, groups)


def repeat_heads(tensor: Tensor, groups: int) -> Tensor:
    """`[batch, kv_heads, …]` to `[batch, kv_heads * groups, …]`, as query heads are ordered."""
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def _sum_groups(tensor: Tensor, groups: int) -> Tensor:
    return tensor if groups == 1 else tensor.unflatten(1, (-1, groups)).sum(2)


def _tiles_pay(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring) -> bool:
    plain = mask is None and not scoring.causal and scoring.softcap is None
    one_dtype = query.dtype == key.dtype == value.dtype
    return plain and one_dtype and query.shape[1] == key.shape[1] and tiled_bfloat16.is_faster(query, key)


def _batches_pay(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring) -> bool:
    plain = mask is None and scoring.causal and scoring.softcap is None and query.dtype == value.dtype
    return plain and batched_bfloat16.is_faster(query, key)


def _has_flash_cpu(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> bool:
    return (
        query.device.type == "cpu"
        and scoring.softcap is None
        and query.shape[-1] == value.shape[-1]
        and query.dtype == key.dtype == value.dtype
    )
