"""The rows' causal part in bfloat16 against float64, with PyTorch's own flash attention as the measure of what is close."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_cartridges.attention import batched_bfloat16

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def _attend(tensors: list[Tensor], grad: Tensor, more: Tensor, groups: int, scale: float) -> list[Tensor]:
    """By flash attention with repeated heads: output, log-sum-exp, and the gradients where the log-sum-exp is `more`
    than this part's own, as a merged attention's is."""
    query, key, value = tensors
    repeated = [tensor.repeat_interleave(groups, dim=1) for tensor in (key, value)]
    output, lse = _flash(query, *repeated, 0.0, True, scale=scale)
    d_query, *rest = _flash_backward(grad, query, *repeated, output, lse + more, 0.0, True, scale=scale)
    return [output, lse, d_query, *(tensor.unflatten(1, (-1, groups)).sum(2) for tensor in rest)]


# The spread is that of the scores: near-uniform weights, ordinary ones, and almost one-hot ones.
@pytest.mark.parametrize("spread", [0.1, 1.5, 4.0])
@pytest.mark.parametrize(
    ("batch", "kv_heads", "groups", "length", "dim"), [(3, 2, 3, 40, 64), (40, 3, 3, 128, 32), (1, 1, 1, 300, 80)]
)
def test_as_close_to_float64_as_flash_attention(
    spread: float, batch: int, kv_heads: int, groups: int, length: int, dim: int
) -> None:
    # As models have them: the heads lie behind the tokens in memory.
    query, grad = torch.randn(2, batch, length, kv_heads * groups, dim).bfloat16().transpose(2, 3).unbind(0)
    key, value = torch.randn(2, batch, length, kv_heads, dim).bfloat16().transpose(2, 3).unbind(0)
    query, key, scale = query * spread, key * spread, dim**-0.5
    more = torch.rand(batch, kv_heads * groups, length)
    wide = [tensor.double() for tensor in (query, key, value)]
    exact = _attend(wide, grad.double(), more.double(), groups, scale)
    flash = _attend([query, key, value], grad, more, groups, scale)
    output, lse = batched_bfloat16.attend_causal(query, key, value, scale)
    gradients = batched_bfloat16.attend_causal_backward(grad, query, key, value, output, lse + more, scale)

    torch.testing.assert_close(lse.double(), exact[1], atol=1e-2, rtol=1e-3)
    for mine, theirs, true in zip([output, *gradients], [flash[0], *flash[2:]], [exact[0], *exact[2:]], strict=True):
        assert mine.shape == true.shape
        assert _error(mine, true) < 4 * _error(theirs, true) + 2e-3


def test_only_bfloat16_rows_of_some_length_are_batched() -> None:
    query, key = torch.randn(2, 4, 32, 64), torch.randn(2, 2, 32, 64)
    assert not batched_bfloat16.is_faster(query, key)
    assert not batched_bfloat16.is_faster(query[:, :, :1].bfloat16(), key.bfloat16())
    assert not batched_bfloat16.is_faster(query[:, :, :16].bfloat16(), key.bfloat16())
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert batched_bfloat16.is_faster(query.bfloat16(), key.bfloat16()) == supported
