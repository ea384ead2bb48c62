"""The gap between no context and the full text in context, and the share of it that something closes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..attention import shared_prefix
from ..kv_prefix import KVPrefix
from .gold_answers import gold_answer_nll


@dataclass(frozen=True)
class ContextGap:
    """The two ends of a scale; lower is better.

    Args:
        no_context: Mean negative log-likelihood (or a divergence) in nats per token without the text.
        full_context: The same with all of the text in context.
    """

    no_context: float
    full_context: float

    def closed(self, value: float) -> float:
        """Share of the gap that `value` closes: 0 as without the text, 1 as with it; NaN where there is no gap."""
        width = self.no_context - self.full_context
        return (self.no_context - value) / width if width > 0 else float("nan")


def measure_context_gap(
    model: nn.Module,
    processing_class: Any,
    questions: Sequence[dict[str, str]],
    text: str,
    *,
    batch_size: int = 16,
) -> ContextGap:
    """The gap on gold answers.

    Args:
        model: A causal LM, without an active cartridge.
        processing_class: Its tokenizer or processor.
        questions: Pairs with `question` and `answer`.
        text: The corpus.
        batch_size: Pairs scored together.

    Raises:
        ValueError: there are no pairs, or one without a question or an answer, or the text is empty.
    """
    none = gold_answer_nll(model, processing_class, questions, batch_size=batch_size)
    with shared_prefix(model, KVPrefix.from_text(model, processing_class, text)):
        full = gold_answer_nll(model, processing_class, questions, in_context=True, batch_size=batch_size)
    return ContextGap(none, full)
