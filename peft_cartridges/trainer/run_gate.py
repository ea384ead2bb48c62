"""The gate that a trainer saves beside its cartridge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..gate import Gate
from ..gate.gate import split_words
from .corpus_study import text_of_contexts

if TYPE_CHECKING:
    from .self_study_trainer import SelfStudyTrainer


def make_run_gate(trainer: SelfStudyTrainer) -> Gate | None:
    """Of the corpus, or of the conversations' `context`; `None` where neither is known, and with `gate=False`."""
    if not trainer.args.gate:
        return None
    data = trainer.train_dataset
    text = trainer.corpus or (None if data is None else text_of_contexts(data))
    if not text or not split_words(text):  # a text without a word has no gate; a run is not lost for it
        return None
    return Gate.make(text, trainer.processing_class)
