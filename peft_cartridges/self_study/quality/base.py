"""What a quality filter is given, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A conversation as filters see it.

    Args:
        messages: User and assistant in turns, each with `role` and `content`.
        context: The chunk.
        seed_type: What the conversation began with; a `recitation`'s answer is a passage of the chunk.
        questions_ended, answers_ended: For each turn, whether the model ended it (or it was cut at its longest).
    """

    messages: Sequence[Mapping[str, str]]
    context: str
    seed_type: str
    questions_ended: Sequence[bool] = ()
    answers_ended: Sequence[bool] = ()

    @property
    def questions(self) -> list[str]:
        return [message["content"] for message in self.messages[0::2]]

    @property
    def answers(self) -> list[str]:
        return [message["content"] for message in self.messages[1::2]]


class QualityFilter(ABC):
    """A reason to drop a conversation.

    Filters are made anew for each chunk. One that remembers what it let pass (`compares = True`) is also run over the
    kept conversations of all chunks in the end.
    """

    compares = False

    @abstractmethod
    def drops(self, candidate: Candidate) -> bool:
        """Whether the conversation is to be dropped."""
