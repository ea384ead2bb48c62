"""How close half precision is to float64: no further than PyTorch's own attention over the whole text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from peft_cartridges.attention import cpu_products
from peft_cartridges.attention.plain_attention import Part, Scoring, attend_plainly, attend_plainly_backward
from peft_cartridges.attention.shared_prefix_attention import PrefixPart, shared_prefix_attention

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

HALF = [torch.bfloat16, torch.float16]
# From near-uniform weights to almost one-hot ones.
SCALES = [1.0, 2.0, 4.0, 8.0]


def _error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


def _whole_text(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
    """What transformers computes with the prefix in every row's cache."""
    batch, _, q_len, _ = query.shape
    num_tokens = prefix_key.shape[1]
    keys = torch.cat([prefix_key.expand(batch, -1, -1, -1), key], 2)
    values = torch.cat([prefix_value.expand(batch, -1, -1, -1).to(value.dtype), value], 2)
    seen = torch.ones(q_len, num_tokens + q_len, dtype=torch.bool).tril(num_tokens)
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen, enable_gqa=True)


def _merged(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
    scoring = Scoring(query.shape[-1] ** -0.5, causal=True)
    return shared_prefix_attention(query, key, value, [PrefixPart(prefix_key, prefix_value)], scoring=scoring)


def _results(attention: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    output = attention(*tensors)
    return [output, *torch.autograd.grad(output, tensors, grad.to(output.dtype))]


def _tensors(scale: float, dtypes: list[torch.dtype], q_len: int, num_tokens: int) -> tuple[list[Tensor], Tensor]:
    """Query, key, value, prefix key and value as leaves, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    # As models have them: the heads lie behind the tokens in memory.
    shapes = [(6, q_len, 4, 32), (6, q_len, 2, 32), (6, q_len, 2, 32), (1, num_tokens, 2, 32), (1, num_tokens, 2, 32)]
    tensors = [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]
    tensors[0] = tensors[0] * scale
    tensors[3:] = [tensor[0] for tensor in tensors[3:]]
    leaves = [tensor.to(dtype).requires_grad_() for tensor, dtype in zip(tensors, dtypes, strict=True)]
    return leaves, torch.randn(6, 4, q_len, 32, generator=generator).bfloat16().float()


def _assert_no_further(autocast: torch.dtype | None, tensors: list[Tensor], grad: Tensor) -> None:
    exact = _results(_whole_text, [tensor.detach().double().requires_grad_() for tensor in tensors], grad)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        theirs, ours = _results(_whole_text, tensors, grad), _results(_merged, tensors, grad)
    assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in theirs]
    _assert_close(ours, theirs, exact)


def _assert_close(
    mine: Sequence[Tensor | None], theirs: Sequence[Tensor | None], exact: Sequence[Tensor | None]
) -> None:
    """Gradients are closer than theirs on the whole, and none is further but for chance; an output, which comes first,
    is rounded once more in its parts."""
    ratios = [
        _error(actual, true) / _error(other, true)
        for actual, other, true in zip(mine, theirs, exact, strict=True)
        if actual is not None and other is not None and true is not None
    ]
    output, *gradients = ratios
    assert len(ratios) == len(exact) and output < 1.5
    assert max(gradients) < 1.25 and sum(gradients) < 1.03 * len(gradients)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("q_len", "num_tokens"), [(64, 100), (24, 300), (300, 40)])
def test_in_half_precision(dtype: torch.dtype, scale: float, q_len: int, num_tokens: int) -> None:
    _assert_no_further(None, *_tensors(scale, [dtype] * 5, q_len, num_tokens))


# Under autocast on a float32 model, RoPE gives float32 queries and keys, the projection half-precision values.
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("q_len", "num_tokens"), [(64, 100), (24, 300)])
def test_under_autocast(dtype: torch.dtype, scale: float, q_len: int, num_tokens: int) -> None:
    float32 = torch.float32
    _assert_no_further(dtype, *_tensors(scale, [float32, float32, dtype, float32, float32], q_len, num_tokens))


def test_autocast_leaves_float64_and_a_backward_inside_it_alone() -> None:
    leaves, grad = _tensors(1.0, [torch.float64] * 5, 7, 9)
    expected = _results(_merged, leaves, grad)
    with torch.autocast("cpu", torch.bfloat16):
        found = _results(_merged, leaves, grad)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype, every_kernel: None) -> None:
    leaves, grad = _tensors(2.0, [dtype] * 5, 64, 300)
    expected = _results(_merged, leaves, grad)
    torch.set_default_dtype(torch.float64)
    try:
        found = _results(_merged, leaves, grad)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.fixture(params=["by flash attention", "by products"])
def every_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both ways that bfloat16 may go on a CPU."""
    monkeypatch.setattr(cpu_products, "_pays", lambda: request.param == "by products")
    yield


def test_a_mask_of_float32_stays_finite_in_half_precision() -> None:
    (query, key, value, prefix_key, prefix_value), _ = _tensors(1.0, [torch.float16] * 5, 7, 9)
    mask = torch.zeros(6, 1, 7, 7).fill_(torch.finfo(torch.float32).min)
    hidden = torch.full((6, 7, 9), torch.finfo(torch.float32).min)
    parts = [PrefixPart(prefix_key, prefix_value), PrefixPart(prefix_key, prefix_value, hidden)]
    output = shared_prefix_attention(query, key, value, parts, mask=mask, scoring=Scoring(0.2))
    weights = (query.double() @ prefix_key.double().repeat_interleave(2, 0).transpose(-1, -2) * 0.2).softmax(-1)
    torch.testing.assert_close(
        output.double(), weights @ prefix_value.double().repeat_interleave(2, 0), atol=1e-2, rtol=0
    )


# -- products in bfloat16 on a CPU, one kernel for itself -------------------------------------------------------------


SHAPES = [(1, 3, 1, 700, 256, 64), (1, 2, 3, 8, 2048, 64), (3, 2, 3, 40, 40, 64), (40, 3, 3, 128, 128, 32)]


def _part(shape: tuple[int, ...], causal: bool, spread: float) -> tuple[Part, Tensor]:
    batch, kv_heads, groups, q_len, kv_len, dim = shape
    query, grad = torch.randn(2, batch, q_len, kv_heads * groups, dim).bfloat16().transpose(2, 3).unbind(0)
    key, value = torch.randn(2, batch, kv_len, kv_heads, dim).bfloat16().transpose(2, 3).unbind(0)
    return Part(query * spread, key, value, None, Scoring(dim**-0.5, causal=causal)), grad


@pytest.mark.parametrize("spread", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_as_close_to_float64_as_flash_attention(spread: float, shape: tuple[int, ...]) -> None:
    part, grad = _part(shape, shape[3] == shape[4], spread)
    wide = Part(*(tensor.double() for tensor in part[:3]), None, part.scoring)  # type: ignore[arg-type]
    wanted = (True, True, True)
    output, lse = attend_plainly(wide)
    more = torch.rand(lse.shape, dtype=torch.float64)  # a merged attention's log-sum-exp is more than a part's own
    exact = [output, *attend_plainly_backward(wide, grad.double(), output, lse + more, wanted)]
    their_output, their_lse = _flash(*part[:3], 0.0, part.scoring.causal, scale=part.scoring.scale)
    saved = (their_output, their_lse + more.float())
    theirs = [
        their_output,
        *_flash_backward(grad, *part[:3], *saved, 0.0, part.scoring.causal, scale=part.scoring.scale),
    ]
    my_output, my_lse = cpu_products.attend(part)
    mine = [my_output.bfloat16(), *cpu_products.attend_backward(part, grad, my_output, my_lse + more.float(), wanted)]
    torch.testing.assert_close(my_lse.double(), lse, atol=1e-5, rtol=1e-5)
    _assert_close(mine, theirs, exact)


def test_which_parts_go_through_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "_pays", lambda: True)
    prefix, _ = _part((1, 2, 2, 512, 512, 64), False, 1.0)
    rows, _ = _part((2, 2, 2, 32, 32, 64), True, 1.0)
    assert cpu_products.takes(prefix, False) and cpu_products.takes(rows, True)
    for other in (
        rows._replace(query=rows.query[:, :, :8], key=rows.key[:, :, :8]),
        rows._replace(mask=torch.zeros(1, 1, 32, 32)),
        rows._replace(scoring=Scoring(1.0, softcap=2.0, causal=True)),
        Part(*(tensor.float() for tensor in rows[:3]), None, rows.scoring),  # type: ignore[arg-type]
    ):
        assert not cpu_products.takes(other, True)
