"""The merge of two parts as one Triton kernel, and as an operator that compiled and captured graphs can hold."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    first, second, first_lse, second_lse, output, lse, heads, length, total, width,
    fb, fh, fq, sb, sh, sq, flb, flh, flq, slb, slh, slq, ob, oh, oq,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < total
    b, h, q = row // (heads * length), row // length % heads, row % length
    one = tl.load(first_lse + b * flb + h * flh + q * flq, inside, 0.0)
    two = tl.load(second_lse + b * slb + h * slh + q * slq, inside, 0.0)
    highest = tl.maximum(one, two)
    merged = highest + tl.log(tl.exp(one - highest) + tl.exp(two - highest))
    tl.store(lse + row, merged, inside)
    column = tl.arange(0, WIDTH)[None, :]
    mask = inside[:, None] & (column < width)
    x = tl.load(first + (b * fb + h * fh + q * fq)[:, None] + column, mask, 0.0).to(tl.float32)
    y = tl.load(second + (b * sb + h * sh + q * sq)[:, None] + column, mask, 0.0).to(tl.float32)
    value = x * tl.exp(one - merged)[:, None] + y * tl.exp(two - merged)[:, None]
    tl.store(output + (b * ob + h * oh + q * oq)[:, None] + column, value.to(output.dtype.element_ty), mask)


def merge_two(
    first: Tensor, second: Tensor, first_lse: Tensor, second_lse: Tensor, heads_last: bool
) -> tuple[Tensor, Tensor]:
    """Merged output `[batch, heads, q_len, value_dim]` in the dtype of `first`, and log-sum-exp `[batch, heads, q_len]`.

    Args:
        first, second: Outputs `[batch, heads, q_len, value_dim]`, of any strides but the last.
        first_lse, second_lse: `[batch, heads, q_len]`, float32; only one may be `-inf`.
        heads_last: Whether the output's heads lie behind its tokens in memory, as models go on with it.
    """
    output, lse = _empty(first, second, first_lse, second_lse, heads_last)
    batch, heads, length, width = first.shape
    rows = batch * heads * length
    strides = (first.stride()[:3], second.stride()[:3], first_lse.stride(), second_lse.stride(), output.stride()[:3])
    _kernel[(triton.cdiv(rows, _ROWS),)](
        first, second, first_lse, second_lse, output, lse, heads, length, rows, width,
        *(stride for tensor in strides for stride in tensor),
        ROWS=_ROWS, WIDTH=triton.next_power_of_2(width),
    )  # fmt: skip
    return output, lse


def _empty(first: Tensor, second: Tensor, first_lse: Tensor, second_lse: Tensor, heads_last: bool) -> Any:
    batch, heads, length, width = first.shape
    if heads_last:
        output = first.new_empty(batch, length, heads, width).transpose(1, 2)
    else:
        output = first.new_empty(first.shape)
    return output, first_lse.new_empty(first_lse.shape)


_library = torch.library.Library("peft_cartridges", "FRAGMENT")
_library.define(
    "merge_two(Tensor first, Tensor second, Tensor first_lse, Tensor second_lse, bool heads_last) -> (Tensor, Tensor)"
)
_library.impl("merge_two", merge_two, "CUDA")
torch.library.register_fake("peft_cartridges::merge_two", _empty, lib=_library)
