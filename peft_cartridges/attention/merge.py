"""Parts of one attention merged by their log-sum-exp: the softmax over all of their keys."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .plain_attention import accumulation_dtype


def merge(
    outputs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None = None, heads_last: bool = True
) -> tuple[Tensor, Tensor]:
    """Merged output and merged log-sum-exp; the output in the dtype that sums are held in, or, from the fused kernel for
    two parts on CUDA, in the parts' own.

    Args:
        outputs: Each `[batch, heads, q_len, value_dim]`.
        lses: Each `[batch, heads, q_len]`; `-inf` where a part has no key for a query, but not in all parts.
        sinks: Scores that carry no value, broadcastable to a log-sum-exp.
        heads_last: Whether heads should lie behind tokens in the output's memory.
    """
    if len(outputs) == 1 and sinks is None:
        return outputs[0], lses[0]
    if len(outputs) == 2 and sinks is None:
        if outputs[0].is_cuda and lses[0].dtype == torch.float32 and _fused_is_usable(outputs[0]):
            return torch.ops.peft_cartridges.merge_two(*outputs, *lses, heads_last)
        return _merge_two(*outputs, *lses)
    scores = list(lses) if sinks is None else [*lses, sinks.to(lses[0].dtype).expand_as(lses[0])]
    lse = torch.stack(scores).logsumexp(0)
    merged = torch.zeros_like(outputs[0], dtype=accumulation_dtype(outputs[0]))
    for output, part_lse in zip(outputs, lses, strict=True):
        merged.addcmul_(output.to(merged.dtype), (part_lse - lse).exp_().unsqueeze(-1))
    return merged, lse


def _merge_two(first: Tensor, second: Tensor, first_lse: Tensor, second_lse: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(first)
    # The second part's weight is exp(lse2) / (exp(lse1) + exp(lse2)).
    weight = (second_lse - first_lse).sigmoid_().unsqueeze(-1)
    return torch.lerp(first.to(dtype), second.to(dtype), weight), torch.logaddexp(first_lse, second_lse)


def _fused_is_usable(like: Tensor) -> bool:
    return _fused_agrees(like.device, like.dtype, like.shape[-1])


@torch.compiler.assume_constant_result
@functools.cache
def _fused_agrees(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether Triton is there, and its kernel gives what plain operations give; one that differs is left aside."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from . import merge_triton

        generator = torch.Generator(device).manual_seed(0)
        outputs = torch.randn(2, 3, 5, 7, width, generator=generator, device=device).to(dtype).unbind(0)
        lses = torch.randn(2, 3, 5, 7, generator=generator, device=device).mul_(4).unbind(0)
        tensors = (outputs[0], outputs[1], lses[0], lses[1])
        pairs = zip(merge_triton.merge_two(*tensors, heads_last=True), _merge_two(*tensors), strict=True)
        error = max(((mine.float() - true).norm() / true.norm()).item() for mine, true in pairs)
    except Exception as problem:  # a compiler's errors have no common class
        reason = f"it fails: {problem}"
    else:
        if error < 1e-2:
            return True
        reason = f"it differs from plain operations by {error:.1e}"
    warnings.warn(f"The fused merge of cartridges is not used in {dtype} on {device}: {reason}.", stacklevel=2)
    return False
