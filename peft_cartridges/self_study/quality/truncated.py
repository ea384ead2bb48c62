"""Turns that were cut at their longest."""

from __future__ import annotations

from .base import Candidate, QualityFilter


class TruncatedQuestion(QualityFilter):
    """Drops a conversation with a question that the model did not end within `max_question_tokens`."""

    def drops(self, candidate: Candidate) -> bool:
        return not all(candidate.questions_ended)


class TruncatedAnswer(QualityFilter):
    """Drops a conversation with an answer that the model did not end within `max_answer_tokens`."""

    def drops(self, candidate: Candidate) -> bool:
        return not all(candidate.answers_ended)
