"""Distances between next-token distributions of a student and a teacher, in nats.

All take logits (or log-probabilities, which are logits too) `[..., vocab_size]` of both and give `[...]`; the gradient
is the student's alone. It has a closed form: with student probabilities q and h the derivative of the distance by q,
d/dlogits = q (h - sum(q h)). That is computed along with the value, some rows at a time, so that nothing but the logits
and their gradient is ever as large as the logits, and what lies between stays in the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Logits `[..., vocab_size]` of student and teacher, to `[...]`.
Divergence = Callable[[Tensor, Tensor], Tensor]

# Log-probabilities of student and teacher `[rows, vocab_size]`, and whether the gradient is wanted, to the value
# `[rows]` and the gradient by the student's logits.
_Rule = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]

# Logits worked on at a time.
_BLOCK = 1 << 20


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student): the student is to cover all that the teacher would say (arXiv 2506.06266)."""
    return _RowwiseDivergence.apply(student_logits, teacher_logits, _forward_kl)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(student || teacher): the student is to say nothing that the teacher would not (arXiv 2306.08543)."""
    return _RowwiseDivergence.apply(student_logits, teacher_logits, _reverse_kl)


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5) -> Tensor:
    """Generalized Jensen–Shannon divergence (arXiv 2306.13649): with the mixture m = beta teacher + (1 - beta) student,
    beta KL(teacher || m) + (1 - beta) KL(student || m). As there and in TRL, 0 and 1 stand for the limits, which are
    the forward and the reverse KL."""
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(student_logits, teacher_logits)
    return _RowwiseDivergence.apply(student_logits, teacher_logits, partial(_jensen_shannon, beta=beta))


def _forward_kl(student: Tensor, teacher: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    weights = teacher.exp()
    value = torch.linalg.vecdot(weights, teacher - student)
    return value, student.exp_().sub_(weights) if with_gradient else None


def _reverse_kl(student: Tensor, teacher: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    weights, difference = student.exp(), student.sub_(teacher)
    value = torch.linalg.vecdot(weights, difference)
    return value, difference.sub_(value[..., None]).mul_(weights) if with_gradient else None


def _jensen_shannon(
    student: Tensor, teacher: Tensor, with_gradient: bool, *, beta: float
) -> tuple[Tensor, Tensor | None]:
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    weights, difference = student.exp(), student.sub_(mixture)
    of_student = torch.linalg.vecdot(weights, difference)
    value = beta * torch.linalg.vecdot(teacher.exp(), teacher - mixture) + (1 - beta) * of_student
    if not with_gradient:
        return value, None
    return value, difference.sub_(of_student[..., None]).mul_(weights).mul_(1 - beta)


class _RowwiseDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, teacher_logits: Tensor, rule: _Rule) -> Tensor:
        vocab_size = student_logits.shape[-1]
        student, teacher = student_logits.reshape(-1, vocab_size), teacher_logits.reshape(-1, vocab_size)
        # Half precision has too few digits for a log-sum-exp over a vocabulary; float64 stays what it is.
        dtype = torch.promote_types(student.dtype, torch.float32)
        values = student.new_empty(len(student), dtype=dtype)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        step = max(1, _BLOCK // max(1, vocab_size))
        for start in range(0, len(student), step):
            rows = slice(start, start + step)
            of_student, of_teacher = (logits[rows].log_softmax(-1, dtype=dtype) for logits in (student, teacher))
            values[rows], block = rule(of_student, of_teacher, gradient is not None)
            if gradient is not None and block is not None:
                gradient[rows] = block
        ctx.save_for_backward(gradient)
        return values.reshape(student_logits.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        shape = (*grad.shape, gradient.shape[-1])
        return (gradient * grad.reshape(-1, 1).to(gradient.dtype)).reshape(shape), None, None
