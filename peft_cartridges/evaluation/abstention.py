"""Abstention: whether a model says that a text does not answer a question, where it does not."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from .scoring import row_of_answer, score_rows
from .system import System

REQUEST = "If the text does not say, answer: The text does not say."
SENTENCE = "The text does not say."

_DECLINES = re.compile(
    r"\b(?:(?:does|do|did|is|are|was|were) ?n(?:o|')t (?:say|state|mention|tell|specif\w+|provide\w*|given|stated|clear"
    r"|known|mentioned|provided)|not (?:stated|mentioned|specified|provided|given)|no (?:information|mention)"
    r"|unanswerable|cannot be (?:answered|determined)|(?:don't|do not) know)\b",
    re.IGNORECASE,
)


def with_request(question: str) -> str:
    """The question with the request to say so where the text does not answer it."""
    return f"{question} {REQUEST}"


def declines(answer: str) -> float:
    """1 where an answer (in English) says that the text does not tell, else 0."""
    return float(bool(_DECLINES.search(answer.replace("’", "'"))))


def abstention_nll(system: System, questions: Sequence[str], *, batch_size: int = 16) -> list[float]:
    """How unlikely the model finds `SENTENCE` as the answer to each question, in nats per token. Tells answerable from
    unanswerable questions where a model is too weak to say it."""
    rows = [row_of_answer(system.codec, with_request(question), SENTENCE) for question in questions]
    return [score.nll / score.tokens for score in score_rows(system, rows, batch_size=batch_size)]


def separation(answerable: Sequence[float], unanswerable: Sequence[float]) -> float:
    """The probability that an unanswerable question finds the sentence likelier than an answerable one does (the area
    under the ROC curve; ties count half): 1 tells them apart always, 0.5 never.

    Args:
        answerable, unanswerable: `abstention_nll` of each.

    Raises:
        ValueError: one of them is empty.
    """
    if not len(answerable) or not len(unanswerable):
        raise ValueError("abstention needs both answerable and unanswerable questions.")
    yes, no = np.asarray(answerable)[:, None], np.asarray(unanswerable)[None, :]
    return float(((no < yes) + 0.5 * (no == yes)).mean())
