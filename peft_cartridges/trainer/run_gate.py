"""The gate that a trainer saves beside its cartridge."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..gate import GATE_FILE, Gate
from ..gate.gate import split_words
from .corpus_study import text_of_contexts

if TYPE_CHECKING:
    from .self_study_trainer import SelfStudyTrainer


class RunGate:
    """The gate of a run, made when it is first saved.

    Args:
        trainer: Whose text it is.
    """

    def __init__(self, trainer: SelfStudyTrainer) -> None:
        self.trainer = trainer

    @cached_property
    def gate(self) -> Gate | None:
        """Of the corpus, or of the conversations' `context`; `None` where neither is known, and with `gate=False`."""
        trainer = self.trainer
        if not trainer.args.gate:
            return None
        data = trainer.train_dataset
        text = trainer.corpus or (None if data is None else text_of_contexts(data))
        if not text or not split_words(text):  # a text without a word has no gate; a run is not lost for it
            return None
        return Gate.make(text, trainer.processing_class)

    def save(self, folder: str) -> None:
        """Puts it into a folder, or takes away an earlier run's."""
        if self.gate is not None:
            self.gate.save_pretrained(folder)
        else:
            Path(folder, GATE_FILE).unlink(missing_ok=True)
