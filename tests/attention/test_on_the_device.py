"""What the attention asks of a GPU, traced without one: how many operations, nothing that waits for data, one graph."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from peft_cartridges.attention import fused_cuda, merge
from peft_cartridges.attention.plain_attention import Scoring
from peft_cartridges.attention.shared_prefix_attention import (
    PrefixPart,
    RowPrefixes,
    _backward,
    _forward,
    _pseudo_batches,
    concatenated_attention,
    shared_prefix_attention,
)

HEADS, KV_HEADS, DIM = 32, 8, 128  # an 8B model's


class _Operations(TorchDispatchMode):
    """Collects what runs on the device: operators that are no views and not about metadata."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        about_metadata = str(function).startswith("prim.") or function._schema.name in _METADATA
        if not (function.is_view or about_metadata):
            self.names.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


# `_unsafe_view` moves nothing; an empty tensor is memory without a kernel.
_METADATA = {"aten::_unsafe_view", "aten::promote_types", "aten::empty.memory_format", "aten::empty", "aten::detach"}


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors on a GPU that have shapes and no data, and what asks whether kernels work there answered."""
    pytest.importorskip("triton")
    from peft_cartridges.attention import merge_triton  # noqa: F401  registers the operator

    monkeypatch.setattr(fused_cuda, "_is_usable", lambda *_: True)
    monkeypatch.setattr(merge, "_fused_is_usable", lambda _: True)
    with FakeTensorMode():
        yield


def _gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, device="cuda", dtype=dtype)


def _rows(batch: int, length: int, heads: int) -> Tensor:
    """As models have them: heads behind tokens."""
    return _gpu(batch, length, heads, DIM).transpose(1, 2)


def _decode(prefixes: list[Any], padded: bool, batch: int = 8) -> list[str]:
    """The operations of one layer's decoding step."""
    query, (key, value) = _rows(batch, 1, HEADS), (_gpu(batch, KV_HEADS, 41, DIM) for _ in "kv")
    mask = _gpu(batch, 1, 1, 41) if padded else None
    with torch.no_grad(), _Operations() as operations:
        output = shared_prefix_attention(query, key, value, prefixes, mask=mask, scoring=Scoring(0.1))
        output.transpose(1, 2).contiguous()
    assert output.shape == query.shape
    return operations.names


def test_operations_of_a_decoding_step(fake_gpu: None) -> None:
    """Beyond the one call of a model's own attention: at most 6 without padding, 8 with."""
    shared = [PrefixPart(_gpu(KV_HEADS, 2048, DIM), _gpu(KV_HEADS, 2048, DIM))]
    flash, efficient = "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"
    names = _decode(shared, padded=False)
    assert names == [flash, "clone", flash, "merge_two"] and len(names) - 1 <= 6
    names = _decode(shared, padded=True)
    assert names == ["constant_pad_nd", efficient, "clone", flash, "merge_two"] and len(names) - 1 <= 8


def test_operations_of_a_decoding_step_with_a_prefix_for_every_row(fake_gpu: None) -> None:
    tensors = [_gpu(64, KV_HEADS, 256, DIM) for _ in "kv"]
    assert len(_decode([RowPrefixes(*tensors)], padded=False, batch=64)) - 1 <= 6
    lengths = _gpu(64, dtype=torch.int64)
    assert len(_decode([RowPrefixes(*tensors, lengths)], padded=True, batch=64)) - 1 <= 8


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_a_training_step_waits_for_nothing(fake_gpu: None, padded: bool, by_row: bool) -> None:
    """Fake tensors have no data: whatever read some would raise. (PyTorch without CUDA has no autograd for them, so forward
    and backward are called by themselves.)"""
    rows = [_rows(8, 128, heads) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    shape = (3, KV_HEADS, 256, DIM) if by_row else (KV_HEADS, 256, DIM)
    prefix = [_gpu(*shape) for _ in "kv"]
    lengths, index = _gpu(3, dtype=torch.int64), _gpu(8, dtype=torch.int64)
    part = RowPrefixes(*prefix, lengths, index) if by_row else PrefixPart(*prefix)
    mask = _gpu(8, 1, 128, 128) if padded else None
    scoring = Scoring(0.1, causal=not padded)
    with torch.no_grad(), _Operations() as operations:
        output, lse = _forward(*rows, None, mask, scoring, [part], True, *prefix)
        context = SimpleNamespace(
            saved_tensors=(*rows, None, mask, output, lse, *prefix),
            scoring=scoring,
            prefixes=[part],
            needs_input_grad=(True, True, True, False, False, False, False, False, True, True),
        )
        gradients = _backward(context, output)
    assert [gradients[number].shape for number in (0, 1, 2, 8, 9)] == [tensor.shape for tensor in (*rows, *prefix)]
    assert not {"_local_scalar_dense", "item", "nonzero", "is_nonzero"} & set(operations.names)
    assert operations.names.count("merge_two") == 1


def test_queries_to_a_short_prefix_fill_the_device(fake_gpu: None) -> None:
    """Flash attention's backward has a block for each head of a batch and each 128 keys."""
    query = _rows(64, 128, HEADS)
    for num_tokens, expected in ((128, 16), (256, 8), (2048, 1), (8192, 1)):
        splits = _pseudo_batches(query, _gpu(KV_HEADS, num_tokens, DIM))
        assert splits == expected and splits * HEADS * num_tokens // 128 >= 2 * 132
    assert _pseudo_batches(_rows(3, 128, HEADS), _gpu(KV_HEADS, 128, DIM)) == 3


def test_without_grouped_heads_in_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with earlier versions of PyTorch, on a CPU: heads are repeated and their gradients summed."""
    rows = [torch.randn(2, heads, 6, 8, requires_grad=True) for heads in (4, 2, 2)]
    prefix = [torch.randn(2, 9, 8, requires_grad=True) for _ in "kv"]

    def results() -> list[Tensor]:
        output = shared_prefix_attention(*rows, [PrefixPart(*prefix)], scoring=Scoring(0.3, causal=True))
        return [output, *torch.autograd.grad(output.square().sum(), [*rows, *prefix])]

    expected = results()
    monkeypatch.setattr("peft_cartridges.attention.kernels._GROUPED_FLASH", False)
    torch.testing.assert_close(results(), expected)


# -- one graph, on the CPU --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("q_len", [1, 24])
@pytest.mark.parametrize("trains", [False, True])
def test_compiles_to_one_graph(by_row: bool, q_len: int, trains: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, q_len, 8), *[(3, 2, 24, 8)] * 2, *[(2, 2, 40, 8) if by_row else (2, 40, 8)] * 2]
    tensors = [torch.randn(shape, generator=generator, requires_grad=trains) for shape in shapes]
    lengths, index = torch.tensor([40, 7]), torch.tensor([1, -1, 0])
    gradient = torch.randn(3, 4, q_len, 8, generator=generator)

    def attention(*tensors: Tensor, reference: bool = False) -> Tensor:
        prefix = RowPrefixes(*tensors[3:], lengths, index) if by_row else PrefixPart(*tensors[3:])
        scoring = Scoring(0.3, causal=q_len > 1)
        if reference:
            return concatenated_attention(*tensors[:3], [prefix], scoring=scoring)[0]
        return shared_prefix_attention(*tensors[:3], [prefix], scoring=scoring)

    def results(output: Tensor) -> list[Tensor]:
        return [output, *(torch.autograd.grad(output, tensors, gradient) if trains else ())]

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled(*tensors)), results(attention(*tensors, reference=True)))


# -- the merge's arithmetic -------------------------------------------------------------------------------------------

_INTERPRETED = """
import torch
from peft_cartridges.attention import merge, merge_triton

for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    one, two = torch.randn(2, 2, 3, 7, 40).to(dtype).unbind(0)
    first_lse, second_lse = torch.randn(2, 2, 7, 3).mul_(5).transpose(2, 3).unbind(0)
    second_lse = second_lse.masked_fill(torch.rand(2, 3, 7) < 0.2, float("-inf"))
    two = two.transpose(1, 2).contiguous().transpose(1, 2)
    for heads_last in (False, True):
        output, lse = merge_triton.merge_two(one, two, first_lse, second_lse, heads_last)
        expected, expected_lse = merge._merge_two(one, two, first_lse, second_lse)
        assert output.dtype == dtype and (output.transpose(1, 2) if heads_last else output).is_contiguous()
        torch.testing.assert_close(output.float(), expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
print("agree")
"""


def test_the_fused_merge_is_the_plain_one() -> None:
    """By Triton's interpreter, which runs a kernel's program on the CPU."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", _INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "agree", done.stderr
