"""The bfloat16 tiles against float64, with PyTorch's own flash attention in bfloat16 as the measure of what is close."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_cartridges.attention import tiled_bfloat16

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


# The spread is that of the scores: near-uniform weights, ordinary ones, and almost one-hot ones.
@pytest.mark.parametrize("spread", [0.1, 1.5, 4.0])
@pytest.mark.parametrize(("q_len", "kv_len", "dim"), [(700, 256, 64), (1024, 513, 80), (130, 2048, 32), (24, 2048, 64)])
def test_as_close_to_float64_as_flash_attention(spread: float, q_len: int, kv_len: int, dim: int) -> None:
    query, grad = torch.randn(2, 1, 2, q_len, dim, dtype=torch.bfloat16).unbind(0)
    key, value = torch.randn(2, 1, 2, kv_len, dim, dtype=torch.bfloat16).unbind(0)
    query, key, scale = query * spread, key * spread, dim**-0.5
    wide = [tensor.double() for tensor in (query, key, value)]
    output, lse = _flash(*wide, 0.0, False, scale=scale)
    exact = [output, *_flash_backward(grad.double(), *wide, output, lse, 0.0, False, scale=scale)]

    flash_output, flash_lse = _flash(query, key, value, 0.0, False, scale=scale)
    flash = [flash_output, *_flash_backward(grad, query, key, value, flash_output, flash_lse, 0.0, False, scale=scale)]
    tiled_output, tiled_lse = tiled_bfloat16.attend_tiled(query, key, value, scale)
    gradients = tiled_bfloat16.attend_tiled_backward(grad, query, key, value, tiled_output, tiled_lse, scale)

    torch.testing.assert_close(tiled_lse.double(), lse, atol=1e-2, rtol=1e-3)
    for mine, theirs, true in zip([tiled_output, *gradients], flash, exact, strict=True):
        assert _error(mine, true) < 4 * _error(theirs, true) + 2e-3


def test_only_large_unmasked_bfloat16_parts_are_tiled() -> None:
    query, key = torch.randn(1, 1, 1024, 64), torch.randn(1, 1, 512, 64)
    assert not tiled_bfloat16.is_faster(query, key)
    assert not tiled_bfloat16.is_faster(query[:, :, :1].bfloat16(), key.bfloat16())
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert tiled_bfloat16.is_faster(query.bfloat16(), key.bfloat16()) == supported
