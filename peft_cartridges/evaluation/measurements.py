"""All metrics of one system, each with its items, so that figures can be summed up over documents later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from . import abstention
from .answers import ANSWER_METRICS, generate_answers
from .config import EvaluationConfig
from .contamination import distinctive_words, leaks
from .documents import Question
from .instructions import Instruction, follows
from .judge import Judge
from .multiple_choice import choose_options
from .scoring import Row, compare_rows, predictions, row_of_answer, row_of_ids, score_rows
from .speed import wall_clock
from .system import System


@dataclass(frozen=True)
class Items:
    """A metric, item by item: its value is the sum of `values` over the sum of `weights`."""

    values: list[float]
    weights: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Items:
        return cls(list(map(float, values)), [1.0] * len(values))


@dataclass
class Material:
    """What systems are measured with.

    Args:
        text: The corpus.
        questions: On it, with gold answers.
        conversations: Held-out rows on it; without any, the full text's own answers to the questions.
        general: Pairs of `prompt` and `answer` that have nothing to do with it.
        general_choices: Multiple choice that has nothing to do with it.
        instructions: With rules that can be checked.
        unanswerable: Questions that it does not answer.
    """

    text: str
    questions: Sequence[Question]
    conversations: Sequence[Row] = ()
    general: Sequence[dict[str, str]] = ()
    general_choices: Sequence[Question] = ()
    instructions: Sequence[Instruction] = ()
    unanswerable: Sequence[Question] = ()


@dataclass
class Measuring:
    """Measures systems against two references, which are computed once.

    Args:
        material: What is asked.
        args: What is measured.
        bare: The model that has read nothing.
        full_text: The model with the text in context, or `None` where it does not fit.
        reason: Why there is no full text.
        judge: Grades generated answers.
        clock: That decoding is timed with.
    """

    material: Material
    args: EvaluationConfig
    bare: System
    full_text: System | None = None
    reason: str = ""
    judge: Judge | None = None
    clock: Callable[[], float] = wall_clock
    _general: list[Row] = field(default_factory=list, init=False)
    _general_states: list[Tensor] = field(default_factory=list, init=False)
    _distinctive: set[str] = field(default_factory=set, init=False)
    _rows: list[Row] = field(default_factory=list, init=False)
    _states: list[Tensor] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        size = {"batch_size": self.args.batch_size}
        codec = self.bare.codec
        if self.material.general:
            self._general = [row_of_answer(codec, pair["prompt"], pair["answer"]) for pair in self.material.general]
            self._general_states = predictions(self.bare, self._general, **size)
            if self.args.generate:
                prompts = [pair["prompt"] for pair in self.material.general]
                given = [text for pair in self.material.general for text in (pair["prompt"], pair["answer"])]
                self._distinctive = distinctive_words(self.material.text, [*given, *self._answers(self.bare, prompts)])
        if self.full_text is not None:
            self._rows = list(self.material.conversations) or self._own_answers(self.full_text)
            self._states = predictions(self.full_text, self._rows, **size)

    @property
    def rows(self) -> Sequence[Row]:
        """What the KL from the text in context is measured on."""
        return self._rows

    def on_context(self, system: System) -> dict[str, Items]:
        """`gold_nll`; `teacher_kl` and `teacher_agreement` (with the text in context) where that is possible;
        `choice_accuracy` where there are options; generated answers."""
        found: dict[str, Items] = {}
        size = {"batch_size": self.args.batch_size}
        questions = self.material.questions
        rows = [row_of_answer(system.codec, q.question, q.answers[0]) for q in questions]
        scores = score_rows(system, rows, **size)
        found["gold_nll"] = Items([s.nll for s in scores], [float(s.tokens) for s in scores])
        if self._rows:
            found |= _divergences("teacher", system, self._rows, self._states, self.args.batch_size)
            del found["teacher_nll"]  # of the teacher's own words: its KL says more
        if choices := [question for question in questions if question.options]:
            chosen = choose_options(system, choices, **size)
            found["choice_accuracy"] = Items.of([c == q.correct for c, q in zip(chosen, choices, strict=True)])
        if self.args.generate:
            asked = [question.question for question in questions]
            answers, golds = self._answers(system, asked), [question.answers for question in questions]
            for name in self.args.answer_metrics:
                found[name] = Items.of([ANSWER_METRICS[name](a, g) for a, g in zip(answers, golds, strict=True)])
            if self.judge is not None:
                found["judged_right"] = Items.of(self.judge(asked, answers, golds))
        return found

    def off_context(self, system: System) -> dict[str, Items]:
        """`general_kl`, `general_agreement` (with the bare model) and `general_nll`; `general_choice_accuracy`,
        `instructions_followed`, `contamination`, `abstained`, where there is material for them."""
        found: dict[str, Items] = {}
        size = {"batch_size": self.args.batch_size}
        material = self.material
        if self._general:
            found |= _divergences("general", system, self._general, self._general_states, self.args.batch_size)
            if self.args.generate:
                answers = self._answers(system, [pair["prompt"] for pair in material.general])
                found["contamination"] = Items.of(leaks(answers, self._distinctive))
        if material.general_choices:
            chosen = choose_options(system, material.general_choices, **size)
            right = [c == q.correct for c, q in zip(chosen, material.general_choices, strict=True)]
            found["general_choice_accuracy"] = Items.of(right)
        if material.instructions and self.args.generate:
            answers = self._answers(system, [instruction.prompt for instruction in material.instructions])
            kept = [follows(a, i) for a, i in zip(answers, material.instructions, strict=True)]
            found["instructions_followed"] = Items.of(kept)
        return found | (self._abstention(system) if material.unanswerable and self.args.abstention else {})

    def _abstention(self, system: System) -> dict[str, Items]:
        """`abstained` on questions that the text does not answer, `abstained_wrongly` on those that it does, and
        `abstention_separation`: for each unanswerable question, the share of answerable ones that it is told from."""
        material, size = self.material, {"batch_size": self.args.batch_size}
        asked = [question.question for question in material.questions]
        unknown = [question.question for question in material.unanswerable]
        here, there = (abstention.abstention_nll(system, side, **size) for side in (asked, unknown))
        found = {"abstention_separation": Items.of([abstention.separation(here, [nll]) for nll in there])}
        if self.args.generate:
            for name, side in (("abstained", unknown), ("abstained_wrongly", asked)):
                answers = self._answers(system, [abstention.with_request(question) for question in side])
                found[name] = Items.of(list(map(abstention.declines, answers)))
        return found

    def _answers(self, system: System, questions: Sequence[str]) -> list[str]:
        ids = generate_answers(
            system, questions, max_new_tokens=self.args.max_new_tokens, batch_size=self.args.batch_size
        )
        return [system.codec.read(row).strip() for row in ids]

    def _own_answers(self, system: System) -> list[Row]:
        """What the system says to the questions, as it says it: the held-out conversations where none are given."""
        asked = [question.question for question in self.material.questions]
        ids = generate_answers(system, asked, max_new_tokens=self.args.max_new_tokens, batch_size=self.args.batch_size)
        taken = [system.codec.take_answer(row) for row in ids]
        return [row_of_ids(system.codec, q, answer) for q, answer in zip(asked, taken, strict=True) if answer]


def _divergences(
    name: str, system: System, rows: Sequence[Row], states: Sequence[Tensor], batch_size: int
) -> dict[str, Items]:
    found = compare_rows(system, rows, states, batch_size=batch_size)
    tokens = [float(row.tokens) for row in found]
    return {
        f"{name}_kl": Items([row.kl for row in found], tokens),
        f"{name}_agreement": Items([float(row.agreed) for row in found], list(tokens)),
        f"{name}_nll": Items([row.nll for row in found], list(tokens)),
    }
