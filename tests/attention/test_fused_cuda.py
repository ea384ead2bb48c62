"""Attention by CUDA's fused kernels: on a GPU against float64, and without one against what the operators say of
themselves (their signatures and shapes), with plain products in the kernels' place."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from peft_cartridges.attention import fused_cuda, plain_attention
from peft_cartridges.attention.kernels import KERNELS
from peft_cartridges.attention.plain_attention import Part, Scoring
from peft_cartridges.attention.shared_prefix_attention import (
    PrefixPart,
    concatenated_attention,
    shared_prefix_attention,
)

MASKS = ["none", "causal", "padding"]


def _problem(
    mask: str, dtype: torch.dtype, device: str = "cpu", width: int = 64
) -> tuple[list[Tensor], Tensor | None, Scoring]:
    """Query, key, value, prefix key, prefix value; the mask and how scores are made."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, 37, width), (2, 3, 37, width), (2, 3, 37, width), (3, 50, width), (3, 50, width)]
    tensors = [torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    padding = None
    if mask == "padding":
        padding = torch.zeros(2, 1, 1, 37, device=device)
        padding[1, ..., :9] = torch.finfo(torch.float32).min
    return tensors, padding, Scoring(width**-0.5, causal=mask == "causal")


def _gradients(attention: Any, tensors: list[Tensor], mask: Tensor | None, scoring: Scoring) -> list[Tensor]:
    query, key, value, prefix_key, prefix_value = tensors
    prefixes = [PrefixPart(prefix_key, prefix_value)]
    output = attention(query, key, value, prefixes, mask=mask, scoring=scoring)
    output = output[0] if isinstance(output, tuple) else output
    grad = torch.linspace(-1, 1, output.numel(), device=output.device).reshape(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad(output, tensors, grad)]


def _assert_as_exact(tensors: list[Tensor], mask: Tensor | None, scoring: Scoring, tolerance: float) -> None:
    found = _gradients(shared_prefix_attention, tensors, mask, scoring)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    exact = _gradients(concatenated_attention, wide, mask, scoring)
    for mine, true in zip(found, exact, strict=True):
        assert mine.dtype == tensors[0].dtype
        assert (mine.double() - true).norm() < tolerance * true.norm()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 4e-3), (torch.float32, 1e-3)])
def test_on_a_gpu(mask: str, width: int, dtype: torch.dtype, tolerance: float) -> None:
    tensors, padding, scoring = _problem(mask, dtype, "cuda", width)
    assert fused_cuda._is_usable(
        "efficient" if dtype == torch.float32 else "flash", tensors[0].device, dtype, width, width
    )
    _assert_as_exact(tensors, padding, scoring, tolerance)


@pytest.mark.parametrize("heads", [2, 4])
def test_the_operators_take_what_they_are_given(heads: int) -> None:
    with FakeTensorMode():
        query = torch.empty(2, 4, 37, 64, device="cuda", dtype=torch.bfloat16)
        key = torch.empty(2, heads, 50, 64, device="cuda", dtype=torch.bfloat16)
        part, wanted = Part(query, key, key, None, Scoring(0.1)), (True, True, True)
        masked = part._replace(mask=torch.zeros(2, 1, 1, 50, device="cuda", dtype=torch.bfloat16))
        results = [fused_cuda.attend_flash(part), fused_cuda.attend_efficient(masked)]
        gradients = [
            fused_cuda.attend_flash_backward(part, query, *results[0], wanted),
            fused_cuda.attend_efficient_backward(masked, query, *results[1], wanted),
        ]
        single = part._replace(query=query.narrow(0, 0, 1), key=key.narrow(0, 0, 1), value=key.narrow(0, 0, 1))
        output, lse = fused_cuda.attend_varlen(single)
        assert (output.shape, lse.shape, lse.dtype) == (single.query.shape, single.query.shape[:3], torch.float32)
        for output, lse in results:
            assert (output.shape, lse.shape, lse.dtype) == (query.shape, query.shape[:3], torch.float32)
        for d_query, d_key, d_value in gradients:
            assert d_query is not None and d_key is not None and d_value is not None
            assert (d_query.shape, d_key.shape, d_value.shape) == (query.shape, key.shape, key.shape)


class _Kernels:
    """CUDA's operators on the CPU, by plain products and as particular as the real ones about what they are given."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.error = 0.0

    def flash(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
        return_debug_mask: bool = False, *, scale: float | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        self.calls.append("flash")
        part = Part(query, key, value, None, Scoring(scale or 1.0, causal=is_causal))
        output, lse = plain_attention.attend_plainly(part)
        return output + self.error, lse, None, None, query.shape[2], key.shape[2], None, None, None

    def varlen(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        given = inspect.signature(varlen.varlen_attn).bind(*args, **kwargs)
        given.apply_defaults()
        self.calls.append("varlen")
        query, key, value, ends, key_ends, max_q, max_k = given.args
        assert (max_q, max_k) == (len(query), len(key))
        if not torch.compiler.is_compiling():
            assert (ends.tolist(), key_ends.tolist()) == ([0, max_q], [0, max_k])
        assert given.kwargs["enable_gqa"] == (query.shape[1] != key.shape[1]) and given.kwargs["return_aux"].lse
        tensors = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)]
        part = Part(tensors[0], tensors[1], tensors[2], None, Scoring(given.kwargs["scale"]))
        output, lse = plain_attention.attend_plainly(part)
        return output[0].transpose(0, 1) + self.error, lse[0]

    def flash_backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
        cum_seq_q: Any, cum_seq_k: Any, max_q: int, max_k: int, dropout_p: float, is_causal: bool,
        philox_seed: Tensor, philox_offset: Tensor, *, scale: float | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        self.calls.append("flash backward")
        assert logsumexp.is_contiguous() and logsumexp.dtype == torch.float32
        assert (max_q, max_k, dropout_p) == (query.shape[2], key.shape[2], 0.0)
        part = Part(query, key, value, None, Scoring(scale or 1.0, causal=is_causal))
        return plain_attention.attend_plainly_backward(part, grad_out, out, logsumexp, (True, True, True))

    def efficient(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, compute_log_sumexp: bool,
        dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        self.calls.append("efficient")
        self._check_bias(attn_bias, query, key)
        assert query.shape[1] == key.shape[1]
        scoring = Scoring(scale or 1.0, causal=is_causal)
        output, lse = plain_attention.attend_plainly(Part(query, key, value, attn_bias, scoring))
        padding = (0, math.ceil(lse.shape[-1] / 32) * 32 - lse.shape[-1])
        return output, torch.nn.functional.pad(lse, padding, value=float("nan")), None, None

    def efficient_backward(
        self, grad_out_: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, out: Tensor,
        logsumexp: Tensor, philox_seed: Tensor, philox_offset: Tensor, dropout_p: float, grad_input_mask: list[bool],
        is_causal: bool = False, *, scale: float | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        self.calls.append("efficient backward")
        self._check_bias(attn_bias, query, key)
        assert out.transpose(1, 2).is_contiguous() and logsumexp.shape[-1] % 32 == 0
        assert (dropout_p, grad_input_mask) == (0.0, [True, True, True, False])
        lse = logsumexp[..., : query.shape[2]]
        part = Part(query, key, value, attn_bias, Scoring(scale or 1.0, causal=is_causal))
        return *plain_attention.attend_plainly_backward(part, grad_out_, out, lse, (True, True, True)), None

    def _check_bias(self, bias: Tensor | None, query: Tensor, key: Tensor) -> None:
        if bias is not None:
            assert bias.shape == (*query.shape[:3], key.shape[2]) and bias.dtype == query.dtype
            assert bias.stride(3) == 1 and all(stride % 16 == 0 for stride in bias.stride()[:3])


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Kernels]:
    """The operators for CPU tensors, registered with their true schemas, and all that asks for a GPU answered."""
    stand_in = _Kernels()
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in ("flash", "efficient"):
            library.impl(f"_scaled_dot_product_{name}_attention", getattr(stand_in, name), "CPU")
            library.impl(f"_scaled_dot_product_{name}_attention_backward", getattr(stand_in, f"{name}_backward"), "CPU")
        half = (torch.float16, torch.bfloat16)
        monkeypatch.setattr(fused_cuda, "_is_candidate", lambda part: part.scoring.softcap is None)
        exists = lambda kernel, device, dtype, *_: kernel == "efficient" or dtype in half  # noqa: E731
        monkeypatch.setattr(fused_cuda, "_exists", exists)
        monkeypatch.setattr(fused_cuda, "_FEWEST_QUERIES", 64)
        stand_in_varlen = stand_in.varlen  # asks the real one for its signature, before it is replaced
        monkeypatch.setattr(fused_cuda, "_varlen_attn", lambda: stand_in_varlen)
        monkeypatch.setattr("peft_cartridges.attention.kernels.KERNELS", KERNELS[2:])
        fused_cuda._agrees.cache_clear()
        yield stand_in
    fused_cuda._agrees.cache_clear()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
def test_merged_from_fused_parts(kernels: _Kernels, mask: str, dtype: torch.dtype, tolerance: float) -> None:
    _assert_as_exact(*_problem(mask, dtype), tolerance)
    kernels.calls.clear()  # with those of the comparison on first use
    _assert_as_exact(*_problem(mask, dtype), tolerance)
    prefix_kernel = "flash" if dtype == torch.bfloat16 else "efficient"
    forward_kernel = "varlen" if dtype == torch.bfloat16 else "efficient"
    rows_kernel = "efficient" if mask == "padding" else prefix_kernel
    assert kernels.calls == [rows_kernel, forward_kernel, f"{rows_kernel} backward", f"{prefix_kernel} backward"]


def test_kernels_are_chosen_in_a_compiled_graph(kernels: _Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_cuda, "_FEWEST_QUERIES", 1024)
    tensors, _, scoring = _problem("causal", torch.bfloat16)
    query, key, value, prefix_key, prefix_value = (tensor.detach() for tensor in tensors)

    def attention(query: Tensor) -> Tensor:
        return shared_prefix_attention(query, key, value, [PrefixPart(prefix_key, prefix_value)], scoring=scoring)

    expected = attention(query)
    kernels.calls.clear()
    compiled = torch.compile(attention, fullgraph=True, backend="eager")(query)
    torch.testing.assert_close(compiled, expected)
    assert kernels.calls == ["flash", "flash"]


def test_pytorchs_own_switches_hold(kernels: _Kernels) -> None:
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        _assert_as_exact(*_problem("causal", torch.bfloat16), 2e-2)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert set(kernels.calls) == {"efficient", "efficient backward"}


def test_a_kernel_that_differs_is_left_aside_with_one_warning(kernels: _Kernels) -> None:
    kernels.error = 0.5
    with pytest.warns(UserWarning, match=r"flash attention is not used .* differs from plain products by") as caught:
        _assert_as_exact(*_problem("causal", torch.bfloat16), 2e-2)
    assert len(caught) == 1
    kernels.calls.clear()
    _assert_as_exact(*_problem("causal", torch.bfloat16), 2e-2)
    assert kernels.calls == ["efficient", "efficient", "efficient backward", "efficient backward"]


def test_a_kernel_that_fails_is_left_aside(kernels: _Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(fused_cuda, "_efficient", no_kernel)
    with pytest.warns(UserWarning, match=r"efficient attention is not used .* fails: no kernel image"):
        _assert_as_exact(*_problem("padding", torch.float32), 1e-5)
    assert kernels.calls == []
