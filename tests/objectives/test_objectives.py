"""Losses against plain formulas in float64, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_cartridges.hidden_states import OutputHead
from peft_cartridges.objectives import (
    OBJECTIVES,
    PADDED_LOGPROB,
    Objective,
    check_objective,
    chunked_sum,
    forward_kl,
    jensen_shannon,
    register_objective,
    reverse_kl,
)
from peft_cartridges.objectives.liger import liger_jsd
from tests.tiny_models import tiny_model


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def _plain(name: str, student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """The formula as it stands in a book, from logits."""
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    if name == "forward_kl":
        return _kl(p, q)
    if name == "reverse_kl":
        return _kl(q, p)
    mixture = beta * p + (1 - beta) * q
    return beta * _kl(p, mixture) + (1 - beta) * _kl(q, mixture)


def _kl_to_states(head: OutputHead) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, states: forward_kl(logits, head(states.to(logits.dtype)).detach())


def assert_value_and_gradient_equal(
    actual: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor], student: Tensor
) -> None:
    """Value and gradient of two functions of the student, in float64."""
    student = student.double().requires_grad_()
    values = [function(student).sum() for function in (actual, expected)]
    gradients = [torch.autograd.grad(2.5 * value, student)[0] for value in values]
    torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("name", "beta"), [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)])
def test_divergences_are_their_formulas(name: str, beta: float) -> None:
    student, teacher = (3 * torch.randn(2, 5, 17).double()).unbind(0)
    divergence = OBJECTIVES[name].divergence(beta)
    assert_value_and_gradient_equal(lambda s: divergence(s, teacher), lambda s: _plain(name, s, teacher, beta), student)
    assert divergence(teacher, teacher).abs().max() < 1e-12


def test_the_ends_of_the_generalized_divergence_are_the_two_kls() -> None:
    student, teacher = torch.randn(2, 5, 17).unbind(0)
    assert torch.equal(jensen_shannon(student, teacher, 0), forward_kl(student, teacher))
    assert torch.equal(jensen_shannon(student, teacher, 1), reverse_kl(student, teacher))


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_chunks_give_the_loss_and_gradient_of_the_whole(name: str, chunk_size: int) -> None:
    head = OutputHead(tiny_model(name, dtype=torch.float64).requires_grad_(False))
    student, teacher = torch.randn(2, 7, 32).double().unbind(0)
    assert_value_and_gradient_equal(
        lambda s: chunked_sum(s, (teacher,), head, _kl_to_states(head), chunk_size=chunk_size),
        lambda s: _plain("forward_kl", head(s), head(teacher)),
        student,
    )


def test_no_more_than_a_chunk_of_logits_exists() -> None:
    seen: list[int] = []

    class Head(OutputHead):
        def __call__(self, hidden: Tensor) -> Tensor:
            seen.append(len(hidden))
            return super().__call__(hidden)

    head = Head(tiny_model().requires_grad_(False))
    states = torch.randn(50, 32, requires_grad=True), torch.randn(50, 32)
    chunked_sum(states[0], (states[1],), head, _kl_to_states(head), chunk_size=8)
    assert max(seen) == 8


def test_a_trainable_head_is_refused() -> None:
    head = OutputHead(tiny_model())
    with pytest.raises(ValueError, match="output head is trainable"):
        chunked_sum(torch.randn(2, 32), (torch.randn(2, 32),), head, _kl_to_states(head))


# -- whole batches -----------------------------------------------------------------------------------------------------


def _batch() -> dict[str, Any]:
    """Two rows with 3 and 2 learned tokens, the second row padded."""
    labels = torch.full((2, 6), -100)
    labels[0, 2:5] = torch.tensor([9, 20, 33])
    labels[1, 1:3] = torch.tensor([40, 41])
    return {"labels": labels, "teacher_hidden_states": torch.randn(5, 32).double()}


# What predicts the learned tokens of `_batch`, row after row.
_ROWS, _POSITIONS = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1, 2, 3, 0, 1])


def _head() -> OutputHead:
    return OutputHead(tiny_model(dtype=torch.float64).requires_grad_(False))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("weighted", [False, True])
def test_exact_targets_with_temperature_and_weights(name: str, weighted: bool) -> None:
    head, batch = _head(), _batch()
    weights = torch.ones(5).double()
    if weighted:
        batch["loss_weights"] = torch.rand(2, 6).double()
        weights = batch["loss_weights"][_ROWS, _POSITIONS + 1]
    objective = Objective(head, name, beta=0.3, temperature=2.0, chunk_size=2)

    def expected(hidden: Tensor) -> Tensor:
        student = head(hidden[_ROWS, _POSITIONS]) / 2
        return weights * _plain(name, student, head(batch["teacher_hidden_states"]) / 2, 0.3)

    assert_value_and_gradient_equal(lambda hidden: objective(hidden, batch), expected, torch.randn(2, 6, 32))


def test_cross_entropy_is_that_of_the_written_tokens() -> None:
    head, batch = _head(), _batch()

    def expected(hidden: Tensor) -> Tensor:
        log_probs = head(hidden[_ROWS, _POSITIONS]).softmax(-1).log()
        return -log_probs[torch.arange(5), torch.tensor([9, 20, 33, 40, 41])]

    objective = Objective(head, "cross_entropy", chunk_size=2)
    assert_value_and_gradient_equal(lambda hidden: objective(hidden, batch), expected, torch.randn(2, 6, 32))


def _with_rest(probabilities: Tensor, ids: Tensor) -> Tensor:
    """Probabilities of some tokens, and of all others together."""
    known = probabilities.gather(-1, ids)
    return torch.cat([known, 1 - known.sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_top_k_targets_compare_the_known_tokens_and_the_rest(name: str) -> None:
    head, batch = _head(), _batch()
    teacher = head(batch.pop("teacher_hidden_states")).softmax(-1)
    batch["teacher_top_k_logprobs"], batch["teacher_top_k_ids"] = teacher.log().topk(4)

    def expected(hidden: Tensor) -> Tensor:
        student = head(hidden[_ROWS, _POSITIONS]).softmax(-1)
        p, q = (_with_rest(one, batch["teacher_top_k_ids"]) for one in (teacher, student))
        return _plain(name, q.log(), p.log())

    objective = Objective(head, name, chunk_size=2)
    hidden = torch.randn(2, 6, 32)
    assert_value_and_gradient_equal(lambda h: objective(h, batch), expected, hidden)
    full = _plain(name, head(hidden.double()[_ROWS, _POSITIONS]), teacher.log()).sum()
    assert 0 < objective(hidden.double(), batch) < full


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_padding_of_top_k_targets_changes_nothing(name: str) -> None:
    head, batch = _head(), _batch()
    teacher = head(batch.pop("teacher_hidden_states")).log_softmax(-1)
    batch["teacher_top_k_logprobs"], batch["teacher_top_k_ids"] = teacher.topk(4)
    objective, hidden = Objective(head, name), torch.randn(2, 6, 32).double()
    expected = objective(hidden, batch)
    batch["teacher_top_k_logprobs"] = torch.nn.functional.pad(
        batch["teacher_top_k_logprobs"], (0, 3), value=PADDED_LOGPROB
    )
    batch["teacher_top_k_ids"] = torch.nn.functional.pad(batch["teacher_top_k_ids"], (0, 3))
    torch.testing.assert_close(objective(hidden, batch), expected)


def test_a_teacher_without_any_rest_gives_finite_losses_and_gradients() -> None:
    head, batch = _head(), _batch()
    del batch["teacher_hidden_states"]
    batch["teacher_top_k_ids"] = torch.tensor([[9, 10]] * 5)
    batch["teacher_top_k_logprobs"] = torch.tensor([[0.9, 0.1]] * 5).log() + 1e-7
    hidden = torch.randn(2, 6, 32, requires_grad=True)
    head = OutputHead(tiny_model().requires_grad_(False))
    for name in ("forward_kl", "reverse_kl", "jsd"):
        loss = Objective(head, name)(hidden, batch)
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert loss.isfinite() and gradient.isfinite().all()


def test_a_batch_with_targets_of_both_kinds_is_the_sum_of_both() -> None:
    head, batch = _head(), _batch()
    states = batch["teacher_hidden_states"]
    logprobs, ids = head(states).log_softmax(-1).topk(4)
    mixed = {
        "labels": batch["labels"], "exact_tokens": torch.tensor([False] * 3 + [True] * 2), "teacher_hidden_states": states[3:],
        "teacher_top_k_ids": ids[:3], "teacher_top_k_logprobs": logprobs[:3],
    }  # fmt: skip
    objective, hidden = Objective(head), torch.randn(2, 6, 32)
    parts = []
    for row in (0, 1):
        labels = batch["labels"].clone()
        labels[1 - row] = -100
        parts.append({**mixed, "labels": labels})
        del parts[-1]["exact_tokens"]
    del parts[0]["teacher_hidden_states"]
    assert_value_and_gradient_equal(
        lambda h: objective(h, mixed), lambda h: objective(h, parts[0]) + objective(h, parts[1]), hidden
    )


@pytest.mark.parametrize(("name", "temperature"), [("forward_kl", 1.0), ("reverse_kl", 1.0), ("jsd", 2.0)])
def test_ligers_fused_loss_is_the_same(name: str, temperature: float) -> None:
    pytest.importorskip("liger_kernel")
    head = OutputHead(tiny_model().requires_grad_(False))
    student, teacher = torch.randn(2, 7, 32).unbind(0)
    student.requires_grad_()
    beta = OBJECTIVES[name].liger_beta(0.3)
    loss = liger_jsd(student, teacher, head, beta=beta, temperature=temperature, chunk_size=2, compiled=False)
    plain = _plain(name, head(student) / temperature, head(teacher) / temperature, 0.3).sum()
    torch.testing.assert_close(loss.double(), plain, atol=1e-4, rtol=1e-4)
    (actual,), (expected,) = (torch.autograd.grad(3 * value, student) for value in (loss, plain))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ligers_fused_loss_is_the_same_compiled() -> None:
    head = OutputHead(tiny_model().requires_grad_(False).cuda())
    student, teacher = torch.randn(2, 600, 32, device="cuda").unbind(0)
    loss = liger_jsd(student, teacher, head, beta=0.0)
    torch.testing.assert_close(
        loss.double(), _plain("forward_kl", head(student), head(teacher)).sum(), atol=1e-2, rtol=1e-3
    )


def test_liger_refuses_a_head_that_is_more_than_a_product() -> None:
    head = OutputHead(tiny_model("gemma2").requires_grad_(False))
    with pytest.raises(ValueError, match="`use_liger_kernel=True` needs an output head that is one linear layer"):
        liger_jsd(torch.randn(2, 32), torch.randn(2, 32), head, beta=0.0, compiled=False)


# -- the table ---------------------------------------------------------------------------------------------------------


def test_every_divergence_says_how_liger_computes_it_or_refuses() -> None:
    pytest.importorskip("liger_kernel")
    head = OutputHead(tiny_model().requires_grad_(False))
    student, teacher = torch.randn(2, 5, 32).unbind(0)
    for name, kind in OBJECTIVES.items():
        if kind.liger_beta is None:
            with pytest.raises(
                ValueError, match=f"does not go with `loss_type='{name}'`, which Liger does not compute"
            ):
                check_objective(name, use_liger=True)
            continue
        assert kind.divergence is not None
        expected = kind.divergence(0.3)(head(student), head(teacher)).sum()
        loss = liger_jsd(student, teacher, head, beta=kind.liger_beta(0.3), compiled=False)
        torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


def test_a_new_divergence_is_one_row_and_never_trains_as_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_cartridges.objectives.objective.OBJECTIVES", dict(OBJECTIVES))
    register_objective("total_variation", lambda s, t: (s.softmax(-1) - t.softmax(-1)).abs().sum(-1) / 2)
    head, batch, hidden = _head(), _batch(), torch.randn(2, 6, 32).double()
    p, q = (head(x).softmax(-1) for x in (hidden[_ROWS, _POSITIONS], batch["teacher_hidden_states"]))
    torch.testing.assert_close(Objective(head, "total_variation")(hidden, batch), (p - q).abs().sum() / 2)
    with pytest.raises(ValueError, match="`use_liger_kernel=True` does not go with `loss_type='total_variation'`"):
        Objective(head, "total_variation", use_liger=True)
    with pytest.raises(ValueError, match="exists already"):
        register_objective("forward_kl", forward_kl)
    with pytest.raises(ValueError, match="`loss_type` must be one of forward_kl"):
        check_objective("forward-kl")
