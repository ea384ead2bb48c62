"""Distances between next-token distributions of a student and a teacher, in nats.

All take logits (or log-probabilities, which are logits too) `[..., vocab_size]` of both and give `[...]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor, logaddexp

from .chunked_loss import chunked_loss

__all__ = ["DIVERGENCES", "chunked_loss", "forward_kl", "get_divergence", "jensen_shannon", "reverse_kl"]

Divergence = Callable[[Tensor, Tensor], Tensor]

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student): the student is to cover all that the teacher would say (arXiv 2506.06266)."""
    student, teacher = _log_probs(student_logits, teacher_logits)
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(student || teacher): the student is to say nothing that the teacher would not (arXiv 2306.08543)."""
    return forward_kl(teacher_logits, student_logits)


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5) -> Tensor:
    """Generalized Jensen–Shannon divergence (arXiv 2306.13649): with the mixture m = beta teacher + (1 - beta) student,
    beta KL(teacher || m) + (1 - beta) KL(student || m). As there and in TRL, 0 and 1 stand for the limits, which are
    the forward and the reverse KL."""
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(student_logits, teacher_logits)
    student, teacher = _log_probs(student_logits, teacher_logits)
    mixture = logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    of_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
    of_student = (student.exp() * (student - mixture)).sum(-1)
    return beta * of_teacher + (1 - beta) * of_student


def get_divergence(name: str, beta: float = 0.5) -> Divergence:
    """The divergence called `name`, one of `DIVERGENCES`."""
    functions: dict[str, Divergence] = {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "jsd": partial(jensen_shannon, beta=beta),
    }
    return functions[name]


def _log_probs(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    # Half precision has too few digits for a log-sum-exp over a vocabulary; float64 stays what it is.
    student, teacher = (
        logits.float() if logits.element_size() < 4 else logits for logits in (student_logits, teacher_logits)
    )
    return student.log_softmax(-1), teacher.log_softmax(-1)
