"""Multiple choice by the likelihood of the options, so that a model that cannot follow a format is measured too."""

from __future__ import annotations

from collections.abc import Sequence

from .documents import Question
from .scoring import row_of_answer, score_rows
from .system import System


def choose_options(system: System, questions: Sequence[Question], *, batch_size: int = 16) -> list[int]:
    """The option of each question that the model finds likeliest per token, as the answer to the bare question (the
    options are not shown). A mean per token keeps long options from losing by their length alone.

    Raises:
        ValueError: a question has no options.
    """
    if missing := [question for question in questions if not question.options]:
        raise ValueError(f"{missing[0].question[:60]!r} has no `options`: it is no multiple-choice question.")
    rows = [row_of_answer(system.codec, q.question, option) for q in questions for option in q.options]
    means = [score.nll / score.tokens for score in score_rows(system, rows, batch_size=batch_size)]
    chosen, start = [], 0
    for question in questions:
        own = means[start : start + len(question.options)]
        chosen.append(own.index(min(own)))
        start += len(own)
    return chosen
