"""What is minimized over the learned tokens of a batch, from one table with a row for each objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..hidden_states import OutputHead
from .chunked_sum import chunked_sum
from .divergences import Divergence, forward_kl, jensen_shannon, reverse_kl
from .liger import liger_jsd
from .top_k import reduce_to_top_k


@dataclass(frozen=True)
class ObjectiveKind:
    """A row of `OBJECTIVES`.

    Args:
        divergence: Given `jsd_beta`, the divergence of the student's logits from the teacher's; `None` for an objective
            that learns the written tokens and wants no teacher.
        liger_beta: Given `jsd_beta`, the weight with which Liger's generalized JSD is the same divergence; `None` where
            Liger has nothing for it, so that `use_liger_kernel=True` is refused.
    """

    divergence: Callable[[float], Divergence] | None
    liger_beta: Callable[[float], float] | None = None

    @property
    def needs_teacher(self) -> bool:
        return self.divergence is not None


OBJECTIVES: dict[str, ObjectiveKind] = {
    "forward_kl": ObjectiveKind(lambda beta: forward_kl, liger_beta=lambda beta: 0.0),
    "reverse_kl": ObjectiveKind(lambda beta: reverse_kl, liger_beta=lambda beta: 1.0),
    "jsd": ObjectiveKind(lambda beta: partial(jensen_shannon, beta=beta), liger_beta=lambda beta: beta),
    "cross_entropy": ObjectiveKind(None),
}


def register_objective(name: str, divergence: Divergence, *, liger_beta: float | None = None) -> None:
    """Adds a divergence that `loss_type` may name.

    Args:
        name: Of the row.
        divergence: Takes logits `[positions, vocab_size]` of student and teacher and gives `[positions]`, in nats.
        liger_beta: Where Liger's generalized JSD with this weight is the same.

    Raises:
        ValueError: the name is taken.
    """
    if name in OBJECTIVES:
        raise ValueError(f"The objective {name!r} exists already: choose another `name`.")
    OBJECTIVES[name] = ObjectiveKind(
        lambda beta: divergence, None if liger_beta is None else lambda beta: float(liger_beta)
    )


def check_objective(name: str, *, use_liger: bool = False) -> ObjectiveKind:
    """The row called `name`.

    Raises:
        ValueError: there is none, or Liger is wanted and cannot compute it.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"`loss_type` must be one of {', '.join(OBJECTIVES)}, got {name!r}.")
    if use_liger and OBJECTIVES[name].liger_beta is None:
        able = ", ".join(key for key, row in OBJECTIVES.items() if row.liger_beta is not None)
        raise ValueError(
            f"`use_liger_kernel=True` does not go with `loss_type={name!r}`, which Liger does not compute: set it to "
            f"False, or choose one of {able}."
        )
    return OBJECTIVES[name]


class Objective:
    """The weighted sum of a loss over the learned tokens of a batch.

    The teacher's targets are exact (`teacher_hidden_states`, behind which the model's own head gives the distribution
    over the whole vocabulary) or the `k` likeliest tokens (`teacher_top_k_ids`, `teacher_top_k_logprobs`, see
    `top_k`); a batch may hold rows of both kinds.

    Args:
        head: The model's output head.
        loss_type: A name in `OBJECTIVES`.
        beta: Of the generalized JSD.
        temperature: Divides the logits of student and teacher; exact targets only.
        chunk_size: Positions whose logits exist at a time.
        use_liger: Whether Liger's fused loss is used where it can be: exact targets of equal weight.

    Raises:
        ValueError: as `check_objective`.
    """

    def __init__(
        self,
        head: OutputHead,
        loss_type: str = "forward_kl",
        *,
        beta: float = 0.5,
        temperature: float = 1.0,
        chunk_size: int = 512,
        use_liger: bool = False,
    ) -> None:
        kind = check_objective(loss_type, use_liger=use_liger)
        self.head = head
        self.temperature = temperature
        self.chunk_size = chunk_size
        self._divergence = None if kind.divergence is None else kind.divergence(beta)
        self._liger_beta = kind.liger_beta(beta) if use_liger and kind.liger_beta is not None else None

    def __call__(self, hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """The sum, as a scalar.

        Args:
            hidden: The student's final hidden states `[batch, q_len, hidden_size]`.
            batch: `labels` `[batch, q_len]` (-100 where nothing is learned), the teacher's targets row after row
                `[learned tokens, …]`, and perhaps `loss_weights` `[batch, q_len]` and `exact_tokens`
                `[learned tokens]`, which tells in a batch of both kinds the tokens with exact targets.
        """
        labels = batch["labels"][:, 1:]
        learned = labels != -100
        student = hidden[:, :-1][learned]
        weights = batch["loss_weights"][:, 1:][learned] if "loss_weights" in batch else None
        if self._divergence is None:
            return self._sum(student, (labels[learned],), _cross_entropy, weights)
        if "exact_tokens" not in batch:
            exact = "teacher_hidden_states" in batch
            return (self._exact if exact else self._top_k)(student, batch, weights)
        total = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
        for chosen, of_kind in ((batch["exact_tokens"], self._exact), (~batch["exact_tokens"], self._top_k)):
            total = total + of_kind(student[chosen], batch, None if weights is None else weights[chosen])
        return total

    def _exact(self, student: Tensor, batch: Mapping[str, Any], weights: Tensor | None) -> Tensor:
        teacher = batch["teacher_hidden_states"]
        if self._liger_beta is not None and weights is None and len(student):
            return liger_jsd(
                student,
                teacher,
                self.head,
                beta=self._liger_beta,
                temperature=self.temperature,
                chunk_size=self.chunk_size,
            )
        return self._sum(student, (teacher,), self._of_states, weights)

    def _of_states(self, logits: Tensor, states: Tensor) -> Tensor:
        assert self._divergence is not None
        with torch.no_grad():
            target = self.head(states.to(logits.dtype))
        return self._divergence(logits / self.temperature, target / self.temperature)

    def _top_k(self, student: Tensor, batch: Mapping[str, Any], weights: Tensor | None) -> Tensor:
        targets = (batch["teacher_top_k_ids"], batch["teacher_top_k_logprobs"])
        return self._sum(student, targets, self._of_top_k, weights)

    def _of_top_k(self, logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
        assert self._divergence is not None
        return self._divergence(*reduce_to_top_k(logits, ids, log_probs))

    def _sum(self, student: Tensor, targets: tuple[Tensor, ...], loss: Any, weights: Tensor | None) -> Tensor:
        if weights is None:
            return chunked_sum(student, targets, self.head, loss, chunk_size=self.chunk_size)
        return chunked_sum(
            student,
            (*targets, weights),
            self.head,
            lambda logits, *known: loss(logits, *known[:-1]) * known[-1],
            chunk_size=self.chunk_size,
        )


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.float() if logits.element_size() < 4 else logits, labels, reduction="none")
