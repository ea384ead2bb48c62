"""Conversations that were there before, word for word."""

from __future__ import annotations

import re

from .base import Candidate, QualityFilter


class Duplicate(QualityFilter):
    """Drops a conversation with the questions and answers of an earlier one; case and punctuation do not count."""

    compares = True

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def drops(self, candidate: Candidate) -> bool:
        text = "\n".join(" ".join(words(message["content"])) for message in candidate.messages)
        known = text in self._seen
        self._seen.add(text)
        return known


def words(text: str) -> list[str]:
    """The words and numbers of a text, in lower case."""
    return re.findall(r"\w+", text.lower())
