"""Contamination: whether a text leaks into answers that have nothing to do with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# Shorter words say little about where they come from.
_WORD = re.compile(r"[^\W\d_]{4,}")


def words(text: str) -> set[str]:
    """The words of at least four letters, in lower case."""
    return {word.lower() for word in _WORD.findall(text)}


def distinctive_words(text: str, elsewhere: Iterable[str]) -> set[str]:
    """Words of `text` that stand in none of the texts `elsewhere`: the prompts, their reference answers and what the
    bare model answers to them. Whatever of them comes up in an answer is not from there."""
    return words(text) - set().union(*map(words, elsewhere))


def leaks(answers: Sequence[str], distinctive: set[str]) -> list[float]:
    """1 for each answer with at least one distinctive word of the text, else 0."""
    return [float(bool(words(answer) & distinctive)) for answer in answers]
