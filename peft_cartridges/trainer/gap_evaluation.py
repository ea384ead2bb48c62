"""How much of what the text in context is worth a cartridge gives, measured while it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from peft import PeftModel

from ..attention.probe import get_text_config
from ..chat import ChatCodec
from ..evaluation.context_gap import ContextGap, measure_context_gap
from ..evaluation.gold_answers import gold_answer_nll

logger = logging.getLogger(__name__)


class GapEvaluation:
    """Metrics for `SelfStudyTrainer.evaluate`; baselines are computed once and kept.

    Args:
        model: The PEFT model.
        processing_class: Its tokenizer or processor, or a `ChatCodec` with it.
        gold_questions: Pairs with `question` and `answer`, which training does not see.
        corpus: The text that the cartridge stands in for; without it there is no baseline with the text in context.
        batch_size: Pairs scored together.
        without_context: The tokenizer or processor for the baseline without context, where that is another.
    """

    def __init__(
        self,
        model: PeftModel,
        processing_class: Any,
        gold_questions: Sequence[dict[str, str]] | None = None,
        corpus: str | None = None,
        *,
        batch_size: int = 16,
        without_context: Any = None,
    ) -> None:
        self.model = model
        self.processing_class = processing_class
        self.gold_questions = list(gold_questions) if gold_questions is not None else []
        self.corpus = corpus
        self.batch_size = batch_size
        self._without_context = processing_class if without_context is None else without_context
        self.gold_gap: ContextGap | None = None
        self._no_context_kl: dict[Any, tuple[Any, float]] = {}

    def of_conversations(self, dataset: Any, kl: float, without_cartridge: Callable[[], float]) -> dict[str, float]:
        """`conversation_gap_closed`: 1 - KL / KL without context. With the chunk in context, which is the teacher, the
        KL is 0.

        Args:
            dataset: What was measured; its baseline is kept for the next time.
            kl: Mean KL from the teacher to the model with the cartridge.
            without_cartridge: Measures it for the model without context.
        """
        key = getattr(dataset, "_fingerprint", None) or id(dataset)
        if key not in self._no_context_kl:
            with self.model.disable_adapter():
                # The data set is kept too: another one must not get its id.
                self._no_context_kl[key] = dataset, without_cartridge()
        baseline = self._no_context_kl[key][1]
        return {"conversation_gap_closed": ContextGap(baseline, 0.0).closed(kl), "no_context_kl": baseline}

    def of_gold_answers(self) -> dict[str, float]:
        """`gold_nll`, and `gold_gap_closed` where the corpus is known and fits into the model's window."""
        if not self.gold_questions:
            return {}
        nll = gold_answer_nll(self.model, self.processing_class, self.gold_questions, batch_size=self.batch_size)
        gap = self._measured_gap()
        metrics = {"gold_nll": nll}
        if gap is not None:
            metrics |= {
                "gold_gap_closed": gap.closed(nll),
                "gold_nll_no_context": gap.no_context,
                "gold_nll_full_context": gap.full_context,
            }
        return metrics

    def _measured_gap(self) -> ContextGap | None:
        if self.gold_gap is None and self.corpus is not None:
            codec = ChatCodec.of(self.model, self.processing_class)
            num_tokens = len(codec.encode_context(self.corpus))
            exchanges = [codec.encode_exchange(pair["question"], pair["answer"]) for pair in self.gold_questions]
            longest = max(len(prompt) + len(answer) for prompt, answer in exchanges)
            window = getattr(get_text_config(self.model), "max_position_embeddings", None)
            if window is not None and num_tokens + longest > window:
                logger.warning(
                    "The corpus has %d tokens and the model's window %d: there is no baseline with all of it in "
                    "context, so no gap is given for `gold_questions`.", num_tokens, window,
                )  # fmt: skip
                self.corpus = None
                return None
            with self.model.disable_adapter():
                self.gold_gap = measure_context_gap(
                    self.model, self._without_context, self.gold_questions, self.corpus, batch_size=self.batch_size
                )
        return self.gold_gap
