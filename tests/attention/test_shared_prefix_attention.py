"""The merged attention against the concatenated one: values and all gradients, for shapes that hypothesis finds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_cartridges.attention import cpu_products, kernels
from peft_cartridges.attention.plain_attention import Part, Scoring
from peft_cartridges.attention.shared_prefix_attention import (
    PrefixPart,
    RowGroups,
    RowPrefixes,
    concatenated_attention,
    shared_prefix_attention,
)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Case:
    """What hypothesis draws: a shape of the problem, and a seed for its numbers."""

    batch: int
    kv_heads: int
    groups: int
    q_len: int
    kv_len: int
    key_dim: int
    value_dim: int
    prefix_lengths: tuple[int, ...]
    prefix_masks: bool
    mask: str | None
    softcap: float | None
    sinks: bool
    dtype: torch.dtype
    seed: int
    prefix_groups: bool = False

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.key_dim**-0.5, self.softcap, causal=self.mask == "causal")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    mask = draw(st.sampled_from([None, "causal", "padding", "per head", "hides everything"]))
    q_len = draw(st.integers(1, 5))
    key_dim = draw(st.sampled_from([1, 4, 7]))
    return Case(
        batch=draw(st.integers(1, 4)),
        kv_heads=draw(st.integers(1, 3)),
        groups=draw(st.integers(1, 3)),
        q_len=q_len,
        kv_len=q_len if mask == "causal" else draw(st.integers(1, 6)),
        key_dim=key_dim,
        value_dim=draw(st.sampled_from([key_dim, 3])),
        prefix_lengths=tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))),
        prefix_masks=draw(st.booleans()),
        mask=mask,
        softcap=draw(st.sampled_from([None, 2.0])),
        sinks=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16])),
        seed=draw(st.integers(0, 2**16)),
        prefix_groups=draw(st.booleans()),
    )


def _tensors(case: Case) -> tuple[dict[str, Tensor], list[PrefixPart], Tensor | None, Tensor]:
    """Leaves by name, the prefixes made of them, the mask of the rows' own part and a gradient of the output."""
    generator = torch.Generator().manual_seed(case.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype).requires_grad_()

    heads = case.kv_heads * case.groups
    leaves = {
        "query": random(case.batch, heads, case.q_len, case.key_dim),
        "key": random(case.batch, case.kv_heads, case.kv_len, case.key_dim),
        "value": random(case.batch, case.kv_heads, case.kv_len, case.value_dim),
    }
    if case.sinks:
        leaves["sinks"] = random(heads)
    parts = []
    hidden = torch.finfo(case.dtype).min
    order = torch.randperm(case.batch, generator=generator).tolist()
    last = int(torch.randint(1, case.batch + 1, (), generator=generator))
    first = int(torch.randint(0, last, (), generator=generator))
    groups = RowGroups.of([rows for rows in (order[:first], order[first:last]) if rows], case.batch)
    for index, length in enumerate(case.prefix_lengths):
        key = leaves[f"prefix key {index}"] = random(case.kv_heads, length, case.key_dim)
        value = leaves[f"prefix value {index}"] = random(case.kv_heads, length, case.value_dim)
        mask, group, number = None, None, case.batch
        if case.prefix_groups and index < 2 * len(groups.sizes):  # the third is one more of the first
            group = (groups if index < len(groups.sizes) else replace(groups), index % len(groups.sizes))
            number = groups.sizes[group[1]]
        if case.prefix_masks:
            seen = torch.rand(number, case.q_len, length, generator=generator) > 0.4
            mask = torch.zeros(seen.shape, dtype=case.dtype).masked_fill(~seen, hidden)
        parts.append(PrefixPart(key, value, mask, group))
    shape = {"padding": (case.batch, 1), "per head": (case.batch, heads), "hides everything": (1, 1)}.get(
        case.mask or ""
    )
    own = None
    if shape is not None:
        seen = torch.rand(*shape, case.q_len, case.kv_len, generator=generator) > 0.4
        if case.mask == "hides everything":
            seen = torch.zeros_like(seen)
        else:
            seen[..., 0] = True
        own = torch.zeros(seen.shape, dtype=case.dtype).masked_fill(~seen, hidden)
    gradient = torch.randn(case.batch, heads, case.q_len, case.value_dim, generator=generator).to(case.dtype)
    return leaves, parts, own, gradient


def _run(case: Case, function: object) -> tuple[Tensor, list[Tensor]]:
    leaves, parts, mask, gradient = _tensors(case)
    output = function(  # type: ignore[operator]
        leaves["query"], leaves["key"], leaves["value"], parts, mask=mask, sinks=leaves.get("sinks"),
        scoring=case.scoring,
    )  # fmt: skip
    output = output[0] if isinstance(output, tuple) else output
    grads = torch.autograd.grad((output * gradient).sum(), list(leaves.values()), materialize_grads=True)
    return output, list(grads)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases())
def test_values_and_gradients(case: Case) -> None:
    output, grads = _run(case, shared_prefix_attention)
    expected, expected_grads = _run(case, concatenated_attention)
    tolerance = TOLERANCE[case.dtype]
    assert output.dtype == expected.dtype == case.dtype
    assert all(tensor.isfinite().all() for tensor in (output, *grads))
    # A query that sees nothing at all has no defined output; everything else must agree.
    torch.testing.assert_close(_defined(case, output), _defined(case, expected), atol=tolerance, rtol=tolerance)
    if not _sees_nothing(case).any():
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad, atol=4 * tolerance, rtol=4 * tolerance)


def _sees_nothing(case: Case) -> Tensor:
    """Queries `[batch, q_len]` to which every key of every part is hidden."""
    _, parts, mask, _ = _tensors(case)
    hidden = torch.finfo(case.dtype).min
    nothing = torch.full((case.batch, case.q_len), mask is not None and case.mask == "hides everything")
    for part in parts:
        unseen = torch.ones(case.batch, case.q_len, dtype=torch.bool)
        rows = slice(None) if part.rows is None else part.rows
        unseen[rows] = False if part.mask is None else ~(part.mask > hidden).any(-1)
        nothing &= unseen
    return nothing


def _defined(case: Case, output: Tensor) -> Tensor:
    return output.masked_fill(_sees_nothing(case)[:, None, :, None], 0.0)


def test_gradcheck_in_float64() -> None:
    case = Case(2, 2, 2, 3, 3, 4, 4, (3, 2), True, "causal", 2.0, True, torch.float64, 0, prefix_groups=True)
    leaves, parts, mask, _ = _tensors(case)
    names = list(leaves)

    def function(*tensors: Tensor) -> Tensor:
        given_leaves = dict(zip(names, tensors, strict=True))
        given_parts = [
            PrefixPart(given_leaves[f"prefix key {i}"], given_leaves[f"prefix value {i}"], part.mask, part.group)
            for i, part in enumerate(parts)
        ]
        return shared_prefix_attention(
            given_leaves["query"], given_leaves["key"], given_leaves["value"], given_parts, mask=mask,
            sinks=given_leaves["sinks"], scoring=case.scoring,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def test_no_copy_of_the_prefix_per_row_is_stored_for_the_backward() -> None:
    case = Case(16, 2, 2, 4, 4, 8, 8, (64,), False, "causal", None, False, torch.float32, 0)
    leaves, parts, _, _ = _tensors(case)
    stored: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        stored.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        shared_prefix_attention(leaves["query"], leaves["key"], leaves["value"], parts, scoring=case.scoring)
    assert max(stored) < case.batch * parts[0].key.numel() / 4


# -- a prefix of its own for every row --------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowCase:
    batch: int
    num_prefixes: int
    groups: int
    q_len: int
    lengths: bool
    index: bool
    mask: bool
    softcap: float | None
    sinks: bool
    dtype: torch.dtype
    seed: int


@st.composite
def row_cases(draw: st.DrawFn) -> RowCase:
    index = draw(st.booleans())
    batch = draw(st.integers(1, 5))
    return RowCase(
        batch=batch,
        num_prefixes=draw(st.integers(1, 5)) if index else batch,
        groups=draw(st.integers(1, 3)),
        q_len=draw(st.sampled_from([1, 1, 2, 5])),
        lengths=draw(st.booleans()),
        index=index,
        mask=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 2.0])),
        sinks=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(row_cases(), st.booleans())
def test_rows_with_prefixes_of_their_own(case: RowCase, trains: bool) -> None:
    generator = torch.Generator().manual_seed(case.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype).requires_grad_(trains)

    query, key, value = random(case.batch, 2 * case.groups, case.q_len, 4), *(random(case.batch, 2, 6, 4) for _ in "kv")
    prefix_key, prefix_value = random(case.num_prefixes, 2, 7, 4), random(case.num_prefixes, 2, 7, 4)
    lengths = torch.randint(0, 8, (case.num_prefixes,), generator=generator) if case.lengths else None
    index = torch.randint(-1, case.num_prefixes, (case.batch,), generator=generator) if case.index else None
    mask = None
    if case.mask:
        seen = torch.rand(case.batch, case.q_len, 7, generator=generator) > 0.4
        mask = torch.zeros(seen.shape, dtype=case.dtype).masked_fill(~seen, torch.finfo(case.dtype).min)
    sinks = random(2 * case.groups) if case.sinks else None
    scoring = Scoring(0.5, case.softcap)
    by_row = [RowPrefixes(prefix_key, prefix_value, lengths, index, mask)]
    output = shared_prefix_attention(query, key, value, by_row, sinks=sinks, scoring=scoring)
    # The same by one shared part for each row, hidden from the others: what no row-wise code has touched.
    parts = []
    for row in range(case.batch):
        number = row if index is None else int(index[row])
        length = 7 if lengths is None else int(lengths[number])
        if number >= 0 and length > 0:
            hidden = torch.full((case.batch, case.q_len, length), torch.finfo(case.dtype).min, dtype=case.dtype)
            hidden[row] = 0.0 if mask is None else mask[row, :, :length]
            parts.append(PrefixPart(prefix_key[number, :, :length], prefix_value[number, :, :length], hidden))
    leaves = [query, key, value, prefix_key, prefix_value] + ([] if sinks is None else [sinks])
    tolerance = TOLERANCE[case.dtype]
    gradient = torch.randn(output.shape, generator=generator).to(case.dtype)
    for prefixes in (parts, by_row):
        expected, _ = concatenated_attention(query, key, value, prefixes, sinks=sinks, scoring=scoring)
        torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
        if trains:
            found, true = (
                torch.autograd.grad(
                    result, leaves, gradient, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for result in (output, expected)
            )
            torch.testing.assert_close(found, true, atol=4 * tolerance, rtol=4 * tolerance)


def test_rows_with_prefixes_of_their_own_are_one_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one for each prefix, and nothing that reads data on the host."""
    parts: list[tuple[int, ...]] = []

    def attend(part: Part) -> tuple[Tensor, Tensor]:
        parts.append(tuple(part.key.shape))
        return kernels.attend(part)

    monkeypatch.setattr("peft_cartridges.attention.shared_prefix_attention.attend", attend)
    query, key, value = torch.randn(64, 4, 1, 8), torch.randn(64, 2, 3, 8), torch.randn(64, 2, 3, 8)
    prefix_key, prefix_value = torch.randn(2, 64, 2, 16, 8).unbind(0)
    lengths, index = torch.randint(1, 17, (64,)), torch.randperm(64)
    calls = [
        RowPrefixes(prefix_key, prefix_value, lengths),
        RowPrefixes(prefix_key, prefix_value, lengths, index),
        RowPrefixes(prefix_key[:3], prefix_value[:3], lengths[:3], index % 3),
    ]
    for prefixes, shape in zip(calls, [(64, 2, 16, 8), (64, 2, 16, 8), (3, 2, 16, 8)], strict=True):
        parts.clear()
        shared_prefix_attention(query, key, value, [prefixes], scoring=Scoring(0.3))
        assert parts == [(64, 2, 3, 8), shape]
        with FakeTensorMode() as mode:  # has no data
            fake = [mode.from_tensor(tensor) for tensor in (query, key, value)]
            tensors = [None if t is None else mode.from_tensor(t) for t in vars(prefixes).values()]
            shared_prefix_attention(*fake, [RowPrefixes(*tensors)], scoring=Scoring(0.3))  # type: ignore[arg-type]


# -- gradients that nobody asked for ----------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", ["query", "prefix value 0", "key"])
@pytest.mark.parametrize("products", [False, True])
def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch, trains: str, products: bool) -> None:
    """A frozen prefix inside a LoRA training, a cartridge on a frozen model: which gradients each kernel is asked for."""
    asked: list[tuple[bool, ...]] = []
    original = kernels.attend_backward

    def attend_backward(part: Part, grad: Tensor, output: Tensor, lse: Tensor, wanted: tuple[bool, bool, bool]) -> Any:
        asked.append(wanted)
        gradients = original(part, grad, output, lse, wanted)
        assert [gradient is not None for gradient in gradients] == list(wanted)
        return gradients

    monkeypatch.setattr("peft_cartridges.attention.shared_prefix_attention.attend_backward", attend_backward)
    monkeypatch.setattr(cpu_products, "_pays", lambda: products)
    case = Case(2, 2, 2, 20, 20, 8, 8, (1000,), False, "causal", None, False, torch.bfloat16, 0)
    leaves, parts, _, gradient = _tensors(case)
    output = shared_prefix_attention(leaves["query"], leaves["key"], leaves["value"], parts, scoring=case.scoring)
    everything = torch.autograd.grad(output, list(leaves.values()), gradient, retain_graph=True)
    asked.clear()
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == trains)
    output = shared_prefix_attention(leaves["query"], leaves["key"], leaves["value"], parts, scoring=case.scoring)
    (grad,) = torch.autograd.grad(output, [leaves[trains]], gradient)
    torch.testing.assert_close(grad, everything[list(leaves).index(trains)])
    assert (
        asked
        == {
            "query": [(True, False, False), (True, False, False)],
            "prefix value 0": [(False, False, False), (False, False, True)],
            "key": [(False, True, False), (False, False, False)],
        }[trains]
    )


@pytest.mark.parametrize("q_len", [1, 300])
def test_the_math_kernel_goes_in_pieces(monkeypatch: pytest.MonkeyPatch, q_len: int) -> None:
    case = Case(2, 2, 2, q_len, q_len, 4, 4, (9,), False, "causal", 2.0, False, torch.float64, 0)
    expected = _run(case, concatenated_attention)
    monkeypatch.setattr("peft_cartridges.attention.plain_attention._SCORES", 256)
    output = _run(case, shared_prefix_attention)
    torch.testing.assert_close(output, expected, atol=1e-9, rtol=1e-9)
