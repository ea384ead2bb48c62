"""The kernels that compute one part of an attention and its log-sum-exp, in the order in which they are asked.

A kernel's forward gives the output `[batch, heads, q_len, value_dim]` and the log-sum-exp of the scores `[batch, heads,
q_len]`. Its backward takes any output and log-sum-exp: given those of a *merged* attention it returns this part's share
of the merged gradient (the identity that ring attention rests on, arXiv 2310.01889). So each direction goes to the first
kernel that takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from . import cpu_products, fused_cuda
from .plain_attention import (
    Gradients,
    Part,
    Wanted,
    attend_plainly,
    attend_plainly_backward,
    repeat_heads,
    sum_groups,
)

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Flash attention on CPUs with fewer heads of keys and values than of queries; tried with this version, not with earlier ones.
_GROUPED_FLASH = TorchVersion(torch.__version__) >= TorchVersion("2.13")


class Kernel(NamedTuple):
    """A way to compute a part.

    Args:
        takes: Whether it computes this part, forward or (`True`) backward.
        forward: Output and log-sum-exp.
        backward: Gradients of query, key and value, given part, output gradient, output, log-sum-exp and which are
            wanted; it may give more, and in float32.
    """

    takes: Callable[[Part, bool], bool]
    forward: Callable[[Part], tuple[Tensor, Tensor]]
    backward: Callable[[Part, Tensor, Tensor, Tensor, Wanted], Gradients]


def attend(part: Part) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one part."""
    return next(kernel for kernel in KERNELS if kernel.takes(part, False)).forward(part)


def attend_backward(part: Part, grad: Tensor, output: Tensor, lse: Tensor, wanted: Wanted) -> Gradients:
    """Gradients of query, key and value (`None` where not `wanted`), for an output and log-sum-exp that may be those of
    a merged attention."""
    if not any(wanted):
        return None, None, None
    kernel = next(kernel for kernel in KERNELS if kernel.takes(part, True))
    gradients = kernel.backward(part, grad, output, lse, wanted)
    return tuple(tensor if want else None for tensor, want in zip(gradients, wanted, strict=True))  # type: ignore[return-value]


def _flash_cpu_takes(part: Part, backward: bool) -> bool:
    query, _, value, _, scoring = part
    return query.device.type == "cpu" and scoring.softcap is None and query.shape[-1] == value.shape[-1]


def _attend_flash_cpu(part: Part) -> tuple[Tensor, Tensor]:
    query, key, value, mask, scoring = part
    if not _GROUPED_FLASH:
        key, value = repeat_heads(key, part.groups), repeat_heads(value, part.groups)
    return _flash_cpu(query, key, value, 0.0, scoring.causal, attn_mask=mask, scale=scoring.scale)


def _attend_flash_cpu_backward(part: Part, grad: Tensor, output: Tensor, lse: Tensor, wanted: Wanted) -> Gradients:
    query, key, value, mask, scoring = part
    if not _GROUPED_FLASH:
        key, value = repeat_heads(key, part.groups), repeat_heads(value, part.groups)
    tensors = (grad, query, key, value, output)
    if query.dtype != torch.float64:
        # In half precision this kernel is slower for short rows and little faster for long ones, also with AMX, and it
        # rounds what is summed over parts then.
        tensors = tuple(tensor.float() for tensor in tensors)  # type: ignore[assignment]
        mask = None if mask is None else mask.float()
    gradients = _flash_cpu_backward(*tensors, lse, 0.0, scoring.causal, attn_mask=mask, scale=scoring.scale)
    if _GROUPED_FLASH:
        return gradients
    return gradients[0], sum_groups(gradients[1], part.groups), sum_groups(gradients[2], part.groups)


KERNELS = (
    Kernel(cpu_products.takes, cpu_products.attend, cpu_products.attend_backward),
    Kernel(_flash_cpu_takes, _attend_flash_cpu, _attend_flash_cpu_backward),
    Kernel(fused_cuda.varlen_takes, fused_cuda.attend_varlen, fused_cuda.attend_flash_backward),
    Kernel(fused_cuda.flash_takes, fused_cuda.attend_flash, fused_cuda.attend_flash_backward),
    Kernel(fused_cuda.efficient_takes, fused_cuda.attend_efficient, fused_cuda.attend_efficient_backward),
    Kernel(lambda part, backward: True, attend_plainly, attend_plainly_backward),
)
