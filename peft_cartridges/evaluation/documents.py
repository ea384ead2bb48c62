"""What is evaluated on: texts with questions, as every task gives them and every local file holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Question:
    """A question with its gold answers.

    Args:
        question: As it is put to the model.
        answers: Gold answers; likelihoods are of the first, generated answers are held against the nearest. None at
            all where the text does not say.
        options: Of a multiple-choice question.
        correct: Index of the right option.

    Raises:
        ValueError: there is no question, or `options` and `correct` do not go together.
    """

    question: str
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    correct: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.question, str) or not self.question.strip():
            raise ValueError("a question is empty: each needs a text under `question`.")
        if self.correct is not None and not 0 <= self.correct < len(self.options):
            raise ValueError(f"`correct={self.correct}` is none of the {len(self.options)} `options` (from 0).")
        if self.options and self.correct is None:
            raise ValueError(f"{self.question[:60]!r} has `options` without `correct`, the index of the right one.")

    @property
    def pair(self) -> dict[str, str]:
        """As `gold_answer_nll` takes it."""
        return {"question": self.question, "answer": self.answers[0]}


@dataclass(frozen=True)
class Document:
    """A text with the questions on it."""

    id: str
    text: str
    questions: tuple[Question, ...]

    @property
    def answerable(self) -> list[Question]:
        return [question for question in self.questions if question.answers]


def question_from_row(row: Mapping[str, Any]) -> Question:
    """Of a row with `question`, and `answer` or `answers`, or `options` and `correct`.

    Raises:
        ValueError: as `Question`.
    """
    given = row.get("answers", row.get("answer"))
    options = tuple(row.get("options") or ())
    answers = (given,) if isinstance(given, str) else tuple(given or ())
    correct = row.get("correct")
    if not answers and correct is not None and 0 <= correct < len(options):
        answers = (options[correct],)
    return Question(row.get("question", ""), tuple(a for a in answers if a.strip()), options, correct)


def document_from_row(row: Mapping[str, Any]) -> Document:
    """Of a row with `text` and `questions`, and `id` where it has one.

    Raises:
        ValueError: the row has no text or no questions, or a question is none.
    """
    name = str(row.get("id", "a document"))
    if not str(row.get("text") or "").strip():
        raise ValueError(f"{name} has no `text`.")
    if not row.get("questions"):
        raise ValueError(f"{name} has no `questions`.")
    try:
        return Document(name, row["text"], tuple(map(question_from_row, row["questions"])))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_gold_answers(documents: Sequence[Document], name: str) -> None:
    """Raises:
    ValueError: there is no document, or none of their questions has an answer: nothing can be measured.
    """
    if not any(document.answerable for document in documents):
        raise ValueError(f"{name} has no question with a gold answer: nothing can be measured on it.")


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file, or of a JSON file that holds a list or one object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    content = path.read_text(encoding="utf-8")
    try:
        whole = json.loads(content)
        rows: list[Any] = whole if isinstance(whole, list) else [whole]
    except json.JSONDecodeError:
        rows = [_parsed(line, f"{path}, line {n}") for n, line in enumerate(content.splitlines(), 1) if line.strip()]
    if wrong := [row for row in rows if not isinstance(row, dict)]:
        raise ValueError(f"{path}: every row must be an object, got a {type(wrong[0]).__name__}.")
    return rows


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}).") from error
