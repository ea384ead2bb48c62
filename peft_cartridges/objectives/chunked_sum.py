"""Sums of a loss over many positions without the logits of all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..hidden_states import OutputHead

# Student logits `[positions, vocab_size]` and what the loss knows of these positions, to `[positions]`.
LogitLoss = Callable[..., Tensor]


def chunked_sum(
    student: Tensor, targets: tuple[Tensor, ...], head: OutputHead, loss: LogitLoss, *, chunk_size: int = 128
) -> Tensor:
    """Sum over positions of `loss(head(student), *targets)`, computed `chunk_size` positions at a time.

    The gradient is taken chunk by chunk in the forward pass, so no more than one chunk's logits exist at any time.

    Args:
        student: Final hidden states `[positions, hidden_size]`, differentiable.
        targets: Tensors `[positions, ...]`, cut into chunks along with `student`.
        head: The model's output head, frozen.
        loss: Of logits `[positions, vocab_size]` and the targets' rows to `[positions]`.
        chunk_size: Positions at a time.

    Returns:
        A scalar in float32 (float64 for states in float64).

    Raises:
        ValueError: the head has trainable parameters, whose gradient this way of computing does not give.
    """
    if head.trainable_parameters():
        raise ValueError(
            "The output head is trainable (`modules_to_save`?): a cartridge is trained on a frozen model. Leave the "
            "output embeddings out."
        )
    with head.gathered():
        return _ChunkedSum.apply(student, targets, head, loss, chunk_size)


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, targets: tuple[Tensor, ...], head: OutputHead, loss: LogitLoss, chunk_size: int
    ) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), device=student.device, dtype=dtype)
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        for start in range(0, len(student), chunk_size):
            rows = slice(start, start + chunk_size)
            piece = student[rows].detach()
            known = [target[rows] for target in targets]
            if gradient is None:
                total += loss(head(piece), *known).sum()
                continue
            with torch.enable_grad():
                value = loss(head(piece.requires_grad_()), *known).sum()
            (gradient[rows],) = torch.autograd.grad(value, piece)
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None
