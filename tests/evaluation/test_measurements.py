"""All metrics of a system whose answers and distributions are known: an engine that says what a script says, and finds
every token equally likely."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import pytest
import torch

from peft_cartridges.chat import ChatCodec
from peft_cartridges.evaluation import EvaluationConfig, Question, System
from peft_cartridges.evaluation.abstention import with_request
from peft_cartridges.evaluation.instructions import Instruction
from peft_cartridges.evaluation.measurements import Items, Material, Measuring
from tests.tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer

MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()
TOKENIZER.add_tokens(["unanswerable"])
CODEC = ChatCodec(None, TOKENIZER)
UNIFORM = math.log(VOCAB_SIZE)


class _Script:
    """Answers a prompt with what is written for it, else with `yes`; its states are 0, so that all logits are."""

    def __init__(self, answers: dict[str, str]) -> None:
        self._answers = {tuple(CODEC.encode_prompt([asked])): answer for asked, answer in answers.items()}

    def states(self, rows: Sequence[list[int]], lengths: Sequence[int]) -> list[torch.Tensor]:
        return [torch.zeros(length, MODEL.config.hidden_size) for length in lengths]

    def generate(self, rows: Sequence[list[int]], max_new_tokens: int, ends: Collection[int]) -> list[list[int]]:
        found = [self._answers.get(tuple(row), "yes") for row in rows]
        return [TOKENIZER(text, add_special_tokens=False)["input_ids"][:max_new_tokens] for text in found]


def _judge(questions: Sequence[str], answers: Sequence[str], golds: Sequence[Sequence[str]]) -> list[float]:
    return [float(answer in gold) for answer, gold in zip(answers, golds, strict=True)]


@pytest.fixture(scope="module")
def found() -> dict[str, Items]:
    material = Material(
        text="the captain and the keeper of the harbor",
        questions=[
            Question("who ?", ("captain",), ("captain", "no"), 0), Question("where ?", ("harbor",), ("no", "harbor"), 1),
            Question("when ?", ("no",)),
        ],
        general=[{"prompt": "what ?", "answer": "harbor"}, {"prompt": "is it ?", "answer": "no"}],
        general_choices=[Question("what ?", ("no",), ("yes", "no"), 1)],
        instructions=[
            Instruction("name it", ("punctuation:no_comma", "change_case:english_capital")),
            Instruction("say it", ("change_case:english_lowercase",)),
        ],
        unanswerable=[Question("what sky ?"), Question("what sea ?")],
    )  # fmt: skip
    # Nothing in context says `keeper` too, so of the text's words only `captain` tells where an answer is from.
    bare = System("bare", MODEL, CODEC, engine=_Script({"is it ?": "keeper"}))
    answers = {
        "who ?": "captain", "where ?": "captain", "what ?": "captain", "is it ?": "keeper",
        with_request("what sky ?"): "unanswerable", with_request("when ?"): "unanswerable",
    }  # fmt: skip
    mine = System("mine", MODEL, CODEC, engine=_Script(answers))
    args = EvaluationConfig(answer_metrics=["exact_match", "token_f1"], max_new_tokens=4)
    measuring = Measuring(material, args, bare, judge=_judge)  # type: ignore[arg-type]
    return {**measuring.on_context(mine), **measuring.off_context(mine)}


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("exact_match", [1.0, 0.0, 0.0]),
        ("token_f1", [1.0, 0.0, 0.0]),
        ("judged_right", [1.0, 0.0, 0.0]),
        # All options are equally likely a token: the first is taken.
        ("choice_accuracy", [1.0, 0.0]),
        ("general_choice_accuracy", [0.0]),
        ("contamination", [1.0, 0.0]),
        # `yes` has no comma, and no capitals.
        ("instructions_followed", [0.5, 1.0]),
        ("abstained", [1.0, 0.0]),
        ("abstained_wrongly", [0.0, 0.0, 1.0]),
        ("abstention_separation", [0.5, 0.5]),
        ("general_agreement", [1.0, 1.0]),
        ("general_kl", [0.0, 0.0]),
    ],
)
def test_by_hand(metric: str, values: list[float], found: dict[str, Items]) -> None:
    items = found[metric]
    assert [v / w for v, w in zip(items.values, items.weights, strict=True)] == pytest.approx(values, abs=1e-6)


def test_likelihoods_are_those_of_equal_chances(found: dict[str, Items]) -> None:
    for metric in ("gold_nll", "general_nll"):
        items = found[metric]
        per_token = [value / weight for value, weight in zip(items.values, items.weights, strict=True)]
        assert per_token == pytest.approx([UNIFORM] * len(per_token), abs=1e-5)
    assert "teacher_nll" not in found and "teacher_kl" not in found  # there is no full text
