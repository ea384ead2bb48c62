"""Attention parts by PyTorch's fused CUDA kernels: flash attention where nothing is masked, memory-efficient attention
for masks and float32.

A shared prefix's forward goes through the public `varlen_attn`. That has no backward for a merged log-sum-exp and would
copy the rows' own caches into its layout, so the others are operators that PyTorch keeps for its own use. Each is held
against plain products on its first use for a device, a dtype and a width of heads. One that fails or differs is left
aside, with a warning: what is slow is then also right. `torch.backends.cuda.enable_flash_sdp(False)` and
`enable_mem_efficient_sdp(False)` switch them off, as they do for PyTorch's own attention.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_efficient_attention,
    can_use_flash_attention,
    flash_sdp_enabled,
    mem_efficient_sdp_enabled,
)
from torch.nn.functional import pad
from torch.torch_version import TorchVersion

from .plain_attention import (
    Gradients,
    Part,
    Scoring,
    Wanted,
    attend_plainly,
    attend_plainly_backward,
    repeat_heads,
    sum_groups,
)

Kernel = Literal["varlen", "flash", "efficient"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
_efficient = torch.ops.aten._scaled_dot_product_efficient_attention
_efficient_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward

# What the memory-efficient kernel reads in one go: elements of a mask's row, and queries' log-sum-exps.
_MASK_ALIGNMENT, _LSE_ALIGNMENT = 16, 32
# Wider heads want, in flash attention's backward, the shared memory that these have (compute capability).
_WIDEST_ELSEWHERE, _LARGE_GPUS = 192, {(8, 0), (9, 0), (10, 0)}
# `varlen_attn` with grouped heads; and from how many queries on the launches for its lengths do not show.
_FEWEST_QUERIES = 1024
_GROUPED_VARLEN = TorchVersion(torch.__version__) >= TorchVersion("2.13")
_TOLERANCE = {torch.float32: 5e-3}  # plain products may run in TF32
_HALF_TOLERANCE = 2e-2


def flash_takes(part: Part, backward: bool) -> bool:
    """Whether flash attention computes this part."""
    width = part.query.shape[-1]
    return (
        _is_candidate(part)
        and part.mask is None
        and width == part.value.shape[-1]
        and _is_usable("flash", part.query.device, part.query.dtype, width, width)
    )


def varlen_takes(part: Part, backward: bool) -> bool:
    """Whether PyTorch's public `varlen_attn` computes this part: forward, many queries to a prefix that rows share."""
    query, width = part.query, part.query.shape[-1]
    return (
        not backward
        and flash_takes(part, backward)
        and len(query) == 1
        and query.shape[2] >= _FEWEST_QUERIES
        and not part.scoring.causal
        and _is_usable("varlen", query.device, query.dtype, width, width)
    )


def efficient_takes(part: Part, backward: bool) -> bool:
    """Whether memory-efficient attention computes this part."""
    widths = (part.query.shape[-1], part.value.shape[-1])
    return _is_candidate(part) and _is_usable("efficient", part.query.device, part.query.dtype, *widths)


def attend_varlen(part: Part) -> tuple[Tensor, Tensor]:
    """As `attend_flash`, for a batch of one."""
    from torch.nn.attention.varlen import AuxRequest  # not in all versions; see `_exists`

    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in part[:3])
    q_len, kv_len, device = len(query), len(key), query.device
    # [0, length], made on the device
    ends = [torch.arange(0, length + 1, length, dtype=torch.int32, device=device) for length in (q_len, kv_len)]
    output, lse = _varlen_attn()(
        query, key, value, ends[0], ends[1], q_len, kv_len,
        return_aux=AuxRequest(lse=True), scale=part.scoring.scale, enable_gqa=part.groups > 1,
    )  # fmt: skip
    return output.transpose(0, 1).unsqueeze(0), lse.unsqueeze(0)


def _varlen_attn() -> Callable[..., Any]:
    from torch.nn.attention import varlen

    return varlen.varlen_attn


def attend_flash(part: Part) -> tuple[Tensor, Tensor]:
    """Output `[batch, heads, q_len, value_dim]` and log-sum-exp `[batch, heads, q_len]`, float32."""
    query, key, value, _, scoring = part
    output, lse, *_ = _flash(query, key, value, 0.0, scoring.causal, scale=scoring.scale)
    return output, lse


def attend_flash_backward(part: Part, grad: Tensor, output: Tensor, lse: Tensor, wanted: Wanted) -> Gradients:
    """Gradients of query, key and value; `output` and `lse` may be those of a merged attention."""
    query, key, value, _, scoring = part
    no_dropout = torch.empty(2, dtype=torch.uint64, device=query.device)
    lengths = (None, None, query.shape[2], key.shape[2])
    # The kernel reads the log-sum-exp without its strides.
    parts = (grad, query, key, value, output.to(query.dtype), lse.float().contiguous())
    return _flash_backward(*parts, *lengths, 0.0, scoring.causal, no_dropout, no_dropout, scale=scoring.scale)


def attend_efficient(part: Part) -> tuple[Tensor, Tensor]:
    """As `attend_flash`, with a mask."""
    query, key, value, _, scoring = part
    key, value = (repeat_heads(tensor, part.groups) for tensor in (key, value))
    output, lse, *_ = _efficient(query, key, value, _aligned(part), True, 0.0, scoring.causal, scale=scoring.scale)
    return output, lse.narrow(-1, 0, query.shape[2])


def attend_efficient_backward(part: Part, grad: Tensor, output: Tensor, lse: Tensor, wanted: Wanted) -> Gradients:
    """As `attend_flash_backward`, with a mask."""
    query, key, value, _, scoring = part
    key, value = (repeat_heads(tensor, part.groups) for tensor in (key, value))
    no_dropout = torch.empty((), dtype=torch.int64, device=query.device)
    lse = pad(lse.float(), (0, -lse.shape[-1] % _LSE_ALIGNMENT), value=float("inf"))
    # The kernel takes the output to lie in memory as it wrote it: [batch, q_len, heads, value_dim].
    output = output.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    parts = (grad, query, key, value, _aligned(part), output, lse)
    d_query, d_key, d_value, _ = _efficient_backward(
        *parts, no_dropout, no_dropout, 0.0, [*wanted, False], scoring.causal, scale=scoring.scale
    )
    return d_query, *(
        sum_groups(tensor, part.groups) if want else None
        for tensor, want in zip((d_key, d_value), wanted[1:], strict=True)
    )


def _is_candidate(part: Part) -> bool:
    query, key = part.query, part.key
    return query.is_cuda and part.scoring.softcap is None and query.numel() > 0 and key.shape[2] > 0


def _aligned(part: Part) -> Tensor | None:
    query, kv_len, mask = part.query, part.key.shape[2], part.mask
    if mask is None:
        return None
    if kv_len % _MASK_ALIGNMENT or not mask.is_contiguous():
        mask = pad(mask, (0, -kv_len % _MASK_ALIGNMENT)).narrow(-1, 0, kv_len)
    return mask.expand(*query.shape[:3], kv_len)


@torch.compiler.assume_constant_result
def _is_usable(kernel: Kernel, device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    enabled = mem_efficient_sdp_enabled() if kernel == "efficient" else flash_sdp_enabled()
    return enabled and _agrees(kernel, device, dtype, key_dim, value_dim)


@functools.cache
def _agrees(kernel: Kernel, device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    """Whether a kernel exists for this, and gives what plain products give: forward and, with the log-sum-exp of a merge,
    backward."""
    if not _exists(kernel, device, dtype, key_dim, value_dim):
        return False
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            masks = (False,) if kernel == "varlen" else (False, True)
            error = max(_error(kernel, causal, device, dtype, key_dim, value_dim) for causal in masks)
    except (RuntimeError, TypeError) as problem:
        reason = f"it fails: {problem}"
    else:
        if error < _TOLERANCE.get(dtype, _HALF_TOLERANCE):
            return True
        reason = f"it differs from plain products by {error:.1e}"
    warnings.warn(
        f"PyTorch's {kernel} attention is not used for cartridges in {dtype} on {device}, which costs time and memory: "
        f"{reason}. Please report this, with your versions of torch ({torch.__version__}) and of CUDA.",
        stacklevel=2,
    )
    return False


def _exists(kernel: Kernel, device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    query, key, value = (torch.empty(1, 1, 8, dim, device=device, dtype=dtype) for dim in (key_dim, key_dim, value_dim))
    params = SDPAParams(query, key, value, None, 0.0, False, False)
    if kernel == "efficient":
        return can_use_efficient_attention(params)
    if kernel == "varlen" and not _GROUPED_VARLEN:
        return False
    large = key_dim <= _WIDEST_ELSEWHERE or torch.cuda.get_device_capability(device) in _LARGE_GPUS
    return key_dim % 8 == 0 and large and can_use_flash_attention(params)


def _error(kernel: str, causal: bool, device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> float:
    """The largest relative error of output, log-sum-exp and gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    batch, q_len, heads, kv_heads = 1 if kernel == "varlen" else 2, 72, 4, 2
    kv_len = q_len if causal else 101
    query, grad = random(batch, heads, q_len, key_dim), random(batch, heads, q_len, value_dim)
    key, value = random(batch, kv_heads, kv_len, key_dim), random(batch, kv_heads, kv_len, value_dim)
    mask = random(batch, 1, q_len, kv_len) if kernel == "efficient" and not causal else None
    part = Part(query, key, value, mask, Scoring(key_dim**-0.5, causal=causal))
    wide = Part(query.float(), key.float(), value.float(), mask, part.scoring)
    output, lse = attend_plainly(wide)
    merged = (output.to(dtype) / 2, lse + 1)  # what a merge with another part could give
    wanted = (True, True, True)
    exact = [output, lse, *attend_plainly_backward(wide, grad.float(), merged[0].float(), merged[1], wanted)]
    attend, backward = {
        "varlen": (attend_varlen, attend_flash_backward),
        "flash": (attend_flash, attend_flash_backward),
        "efficient": (attend_efficient, attend_efficient_backward),
    }[kernel]
    found = [*attend(part), *backward(part, grad, *merged, wanted)]
    errors = [
        (mine.float() - true).norm() / true.norm()
        for mine, true in zip(found, exact, strict=True)
        if mine is not None and true is not None
    ]
    return max(error.item() for error in errors)
