"""When a cartridge has paid for its training, against reading the text for every conversation."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class BreakEven:
    """Costs in one unit of your choice: seconds, FLOPs, money.

    Args:
        making: Once: synthesis and training.
        reading_text: For each conversation, with the text in context: its prefill.
        loading_cartridge: For each conversation, with the cartridge; next to nothing where it stays in memory.
        text_tokens: Length of the text.

    Raises:
        ValueError: a cost is negative, or the text has no tokens.
    """

    making: float
    reading_text: float
    text_tokens: int
    loading_cartridge: float = 0.0

    def __post_init__(self) -> None:
        for name in ("making", "reading_text", "loading_cartridge"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.text_tokens < 1:
            raise ValueError(f"`text_tokens` must be at least 1, got {self.text_tokens}.")

    @property
    def conversations(self) -> float:
        """Conversations after which the cartridge is the cheaper way; infinite if it saves nothing."""
        saved = self.reading_text - self.loading_cartridge
        return float(math.ceil(self.making / saved)) if saved > 0 else math.inf

    @property
    def tokens(self) -> float:
        """Tokens of the text that those conversations would have read."""
        return self.conversations * self.text_tokens


def training_tokens(
    *, question_tokens: int, answer_tokens: int, chunk_tokens: int, input_tokens: int, epochs: float = 1.0
) -> float:
    """What self-study costs, in tokens of a forward pass through the model.

    A token that is decoded, scored or prefilled is one forward; a token that is trained on is two, as the backward
    pass goes through a frozen model and computes no gradient of its weights.

    Args:
        question_tokens, answer_tokens: Sampled in all.
        chunk_tokens: Prefilled in all: the chunks' lengths, each counted once however many conversations share it.
        input_tokens: Of all conversations, as the student sees them.
        epochs: Passes over them.
    """
    scoring = question_tokens + answer_tokens
    return chunk_tokens + question_tokens + answer_tokens + scoring + 2 * epochs * input_tokens
