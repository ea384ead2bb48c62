"""What is minimized: one of the divergences, or cross-entropy, over the learned tokens of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..hidden_states import OutputHead
from .chunked_loss import chunked_sum
from .liger_loss import liger_loss
from .losses import DIVERGENCES, get_divergence
from .top_k import reduce_to_top_k

LOSS_TYPES = (*DIVERGENCES, "cross_entropy")


class Objective:
    """The weighted sum of a loss over the learned tokens of a batch.

    The teacher's targets are exact (`teacher_hidden_states`, behind which the model's own head gives the distribution
    over the whole vocabulary) or the `k` likeliest tokens (`teacher_top_k_ids`, `teacher_top_k_logprobs`, see
    `top_k`); a batch may hold rows of both kinds.

    Args:
        head: The model's output head.
        loss_type: One of `LOSS_TYPES`.
        beta: Of the generalized JSD.
        temperature: Divides the logits of student and teacher; exact targets only.
        chunk_size: Positions whose logits exist at a time.
        use_liger: Whether Liger's fused loss is used where it can be: exact targets of equal weight.
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
        self.head = head
        self.loss_type = loss_type
        self.beta = beta
        self.temperature = temperature
        self.chunk_size = chunk_size
        self.use_liger = use_liger
        self._divergence = None if loss_type == "cross_entropy" else get_divergence(loss_type, beta)

    def __call__(self, hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """The sum, as a scalar.

        Args:
            hidden: The student's final hidden states `[batch, q_len, hidden_size]`.
            batch: `labels` `[batch, q_len]` (-100 where nothing is learned), the teacher's targets row after row
                `[learned tokens, …]`, and perhaps `loss_weights` `[batch, q_len]` and `exact_rows` `[batch]`, which
                tells in a batch of both kinds the rows with exact targets.
        """
        labels = batch["labels"][:, 1:]
        learned = labels != -100
        student = hidden[:, :-1][learned]
        weights = batch["loss_weights"][:, 1:][learned] if "loss_weights" in batch else None
        if self._divergence is None:
            return self._sum(student, (labels[learned],), _cross_entropy, weights)
        if "exact_rows" not in batch:
            exact = "teacher_hidden_states" in batch
            return (self._exact if exact else self._top_k)(student, batch, weights)
        rows = batch["exact_rows"][:, None].expand_as(learned)[learned]
        parts = ((rows, self._exact), (~rows, self._top_k))
        return sum(
            (
                of_kind(student[chosen], batch, None if weights is None else weights[chosen])
                for chosen, of_kind in parts
            ),
            start=student.new_zeros(()),
        )

    def _exact(self, student: Tensor, batch: Mapping[str, Any], weights: Tensor | None) -> Tensor:
        teacher = batch["teacher_hidden_states"]
        if self.use_liger and weights is None and len(student):
            return liger_loss(
                student,
                teacher,
                self.head,
                loss_type=self.loss_type,
                beta=self.beta,
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
