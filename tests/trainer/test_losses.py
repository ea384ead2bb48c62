"""Losses against plain formulas in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch

from peft_cartridges.hidden_states import OutputHead
from peft_cartridges.trainer.losses import chunked_loss, forward_kl
from tests.tiny_models import tiny_model


def _plain_forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    return (p * (p / q).log()).sum(-1)


def test_forward_kl_is_its_formula() -> None:
    student, teacher = torch.randn(2, 5, 17).unbind(0)
    torch.testing.assert_close(forward_kl(student, teacher).double(), _plain_forward_kl(student, teacher))


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gpt2"])
def test_the_head_is_the_models_own(name: str) -> None:
    model = tiny_model(name)
    head = OutputHead(model)
    ids = torch.arange(8, 20)[None]
    with torch.no_grad():
        expected = model(ids).logits
        actual = head(head.decoder(ids).last_hidden_state)
    torch.testing.assert_close(actual, expected)
    assert "forward" not in vars(head.decoder)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_chunks_give_the_loss_and_gradient_of_the_whole(name: str, chunk_size: int) -> None:
    head = OutputHead(tiny_model(name).requires_grad_(False))
    student, teacher = torch.randn(2, 7, 32).unbind(0)
    student.requires_grad_()
    loss = chunked_loss(student, teacher, head, forward_kl, chunk_size=chunk_size)
    (actual,) = torch.autograd.grad(3 * loss, student)
    plain = _plain_forward_kl(head(student), head(teacher)).sum()
    (expected,) = torch.autograd.grad(3 * plain, student)
    torch.testing.assert_close(loss.double(), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual, expected.float(), atol=1e-4, rtol=1e-4)


def test_a_trainable_head_is_refused() -> None:
    head = OutputHead(tiny_model())
    with pytest.raises(ValueError, match="output head is trainable"):
        chunked_loss(torch.randn(2, 32), torch.randn(2, 32), head, forward_kl)
