"""Turns without a word."""

from __future__ import annotations

from .base import Candidate, QualityFilter


class Empty(QualityFilter):
    """Drops a conversation with a question or an answer that holds no letter and no digit."""

    def drops(self, candidate: Candidate) -> bool:
        return not candidate.messages or any(
            not any(character.isalnum() for character in message["content"]) for message in candidate.messages
        )
