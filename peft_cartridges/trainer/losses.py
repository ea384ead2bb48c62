"""Distances between next-token distributions, and their sum over many positions without all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..hidden_states import OutputHead

LogitLoss = Callable[[Tensor, Tensor], Tensor]


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of logits `[..., vocab_size]`, in nats: `[...]`. The paper's objective."""
    student = student_logits.float().log_softmax(-1)
    teacher = teacher_logits.float().log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1)


def chunked_loss(
    student: Tensor, teacher: Tensor, head: OutputHead, loss: LogitLoss, *, chunk_size: int = 512
) -> Tensor:
    """Sum over positions of `loss(head(student), head(teacher))`, computed `chunk_size` positions at a time.

    The gradient is taken chunk by chunk in the forward pass, so no more than one chunk's logits exist at any time.

    Args:
        student: Final hidden states `[positions, hidden_size]`, differentiable.
        teacher: Final hidden states `[positions, hidden_size]`.
        head: The model's output head, frozen.
        loss: Of logits `[positions, vocab_size]` and `[positions, vocab_size]` to `[positions]`.
        chunk_size: Positions at a time: memory is about `4 * chunk_size * vocab_size` floats.

    Returns:
        A scalar in float32.

    Raises:
        ValueError: the head has trainable parameters, whose gradient this way of computing does not give.
    """
    if head.trainable_parameters():
        raise ValueError(
            "The output head is trainable (`modules_to_save`?): a cartridge is trained on a frozen model. Leave the "
            "output embeddings out."
        )
    return _ChunkedLoss.apply(student, teacher, head, loss, chunk_size)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, head: OutputHead, loss: LogitLoss, chunk_size: int
    ) -> Tensor:
        total = torch.zeros((), device=student.device)
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        for start in range(0, len(student), chunk_size):
            rows = slice(start, start + chunk_size)
            piece = student[rows].detach()
            with torch.no_grad():
                target = head(teacher[rows].to(student.dtype))
            if gradient is None:
                total += loss(head(piece), target).sum()
                continue
            with torch.enable_grad():
                value = loss(head(piece.requires_grad_()), target).sum()
            (gradient[rows],) = torch.autograd.grad(value, piece)
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None
