"""A whole evaluation on a tiny model: what stands in the report, what it is beside, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from peft_cartridges import Gate, KVPrefix, gold_answer_nll
from peft_cartridges.evaluation import EvaluationConfig, EvaluationReport, evaluate_cartridge
from peft_cartridges.evaluation.baselines import Bench
from peft_cartridges.evaluation.evaluate import evaluate_systems
from peft_cartridges.evaluation.report import METRICS
from tests.exactness import cartridge_model
from tests.tiny_models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = "the old captain says yes . the new ship is red . " * 4
QUESTIONS: list[dict[str, Any]] = [
    {"question": "what is the ship ?", "answer": "the ship is red ."},
    {"question": "who says yes ?", "options": ["the captain .", "the keeper ."], "correct": 0},
    {"question": "where ?", "answers": ["the harbor .", "the sea ."]},
]
EVERYTHING: dict[str, Any] = {
    "general": [{"prompt": "when ?", "answer": "seven days ."}, {"prompt": "is it new ?", "answer": "no ."}],
    "general_choices": [{"question": "is it old ?", "options": ["yes .", "no ."], "correct": 1}],
    "instructions": [{"prompt": "what ?", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}],
    "unanswerable": [{"question": "what is a light ?"}],
}
ARGS = EvaluationConfig(max_new_tokens=3, answer_metrics=["exact_match", "token_f1"], bootstrap_samples=50)


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    model = tiny_model()
    prefix = KVPrefix.from_text(model, TOKENIZER, TEXT)[:12]
    return evaluate_cartridge(
        cartridge_model(model, prefix), TOKENIZER, text=TEXT, questions=QUESTIONS, args=ARGS, command="x", **EVERYTHING
    )


def test_every_system_has_every_metric_beside_the_full_text(report: EvaluationReport) -> None:
    assert [result.name for result in report.systems] == ["no context", "full text", "cartridge", "first tokens"]
    expected = set(METRICS) - {"gap_closed", "rouge_l", "chrf", "judged_right", "gate_accepted", "gate_rejected"}
    assert all(set(result.items) == expected for result in report.systems)
    assert [result.num_tokens for result in report.systems[2:]] == [12, 12]
    assert all(r.tokens_per_second is not None and r.tokens_per_second > 0 for r in report.systems)


def test_the_references_are_at_zero(report: EvaluationReport) -> None:
    def value(system: str, metric: str) -> float:
        found = report.get(system, metric)
        assert found is not None
        return found.value

    assert abs(value("full text", "teacher_kl")) < 1e-6 and value("full text", "teacher_agreement") == 1.0
    assert abs(value("no context", "general_kl")) < 1e-6 and value("no context", "contamination") == 0.0
    assert value("cartridge", "general_kl") > 1e-3 < value("cartridge", "teacher_kl")
    # A cartridge of the text's first tokens is the baseline of its first tokens.
    for metric in ("gold_nll", "teacher_kl", "general_kl", "abstention_separation"):
        assert value("cartridge", metric) == pytest.approx(value("first tokens", metric), abs=1e-4)


def test_the_likelihood_and_the_gap_are_those_of_gold_answers(report: EvaluationReport) -> None:
    pairs = [{"question": q["question"], "answer": a} for q, a in zip(
        QUESTIONS, ["the ship is red .", "the captain .", "the harbor ."], strict=True
    )]  # fmt: skip
    none = report.get("no context", "gold_nll")
    assert none is not None and none.n == 3
    assert none.value == pytest.approx(gold_answer_nll(tiny_model(), TOKENIZER, pairs), abs=1e-4)
    full, ours, share = (report.get(*key) for key in (
        ("full text", "gold_nll"), ("cartridge", "gold_nll"), ("cartridge", "gap_closed")
    ))  # fmt: skip
    assert full is not None and ours is not None and share is not None
    width = none.value - full.value
    expected = (none.value - ours.value) / width if width > 0 else math.nan
    assert share.value == pytest.approx(expected, nan_ok=True)


def test_behind_its_gate_each_figure_is_the_cartridge_s_or_the_bare_model_s() -> None:
    model = tiny_model()
    cartridge = cartridge_model(model, KVPrefix.from_text(model, TOKENIZER, TEXT)[:12])
    # Its threshold lies between the scores of the two general prompts, and of the questions.
    gate = Gate.make(TEXT, TOKENIZER, general=["when ?"], reject_general=0.5)
    gate = dataclasses.replace(gate, threshold=(gate.score("is it new ?") + gate.score("when ?")) / 2)
    assert gate(["is it new ?", "when ?"]) == [True, False]
    accepted = gate([question["question"] for question in QUESTIONS])
    assert accepted[0] and not accepted[2]
    report = evaluate_cartridge(
        cartridge, TOKENIZER, text=TEXT, questions=QUESTIONS, args=ARGS, baselines=[], gate=gate, **EVERYTHING
    )
    assert [result.name for result in report.systems] == ["no context", "full text", "cartridge", "cartridge, gated"]
    bare, _, plain, gated = report.systems
    assert gated.items["gate_accepted"].values == [float(one) for one in accepted]
    assert gated.items["gate_rejected"].values == [1.0, 0.0] and "gate_rejected" not in plain.items
    for metric, uses in {"gold_nll": accepted, "token_f1": accepted, "general_kl": [False, True]}.items():
        expected = [(plain if use else bare).items[metric].values[i] for i, use in enumerate(uses)]
        assert gated.items[metric].values == expected, metric
    assert not any(metric.startswith("abst") for metric in gated.items)
    kl = [report.get(name, "general_kl") for name in ("cartridge, gated", "cartridge")]
    assert kl[0] is not None and kl[1] is not None and 0 < kl[0].value < kl[1].value
    assert EvaluationReport.from_dict(report.to_dict()).table() == report.table()
    assert "rejected by the gate" in report.table()


def test_the_report_survives_its_file(report: EvaluationReport, tmp_path: Path) -> None:
    report.save(tmp_path / "report.json")
    record = json.loads((tmp_path / "report.json").read_text())
    cartridge = record["systems"][2]
    assert cartridge["metrics"]["gold_nll"]["n"] == 3 and record["command"] == "x"
    assert "captain" not in json.dumps(record)  # numbers only: a report may be published where its text may not
    read = EvaluationReport.from_dict(record)
    assert read.table() == report.table() and read.get("cartridge", "gold_nll") == report.get("cartridge", "gold_nll")


def test_table_and_card(report: EvaluationReport) -> None:
    table = report.table()
    assert "| cartridge | 12 |" in table and "gold-answer NLL ↓" in table and "### Off the text" in table
    metrics = {metric.type: metric for metric in report.card_metrics("three questions")}
    assert (
        metrics["general_kl"].dataset == "three questions" and "with the text in context" in metrics["general_kl"].note
    )
    assert metrics["gold_nll"].command == "x" and "95 % interval" in metrics["gold_nll"].note


def test_the_plot(report: EvaluationReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "plot.png", "gold_nll")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model()
    prefix = KVPrefix.from_text(model, TOKENIZER, TEXT)[:12]
    peft_model = cartridge_model(model, prefix).train()
    pair = [{"question": "what ?", "answer": "the sea ."}]
    before = gold_answer_nll(peft_model, TOKENIZER, pair)
    args = EvaluationConfig(generate=False, speed=False)
    evaluate_cartridge(peft_model, TOKENIZER, text=TEXT, questions=QUESTIONS, args=args)
    assert peft_model.training and gold_answer_nll(peft_model, TOKENIZER, pair) == before


def test_a_text_longer_than_the_window_has_no_full_text_row() -> None:
    bench = Bench(tiny_model(max_position_embeddings=200), TOKENIZER, TEXT, 8)
    args = EvaluationConfig(generate=False, speed=False)
    report = evaluate_systems([], bench, questions=QUESTIONS, baselines=["first_tokens", "quantized_4bit"], args=args)
    reason = report["full text"].reason
    assert reason is not None and "the model's window 200: it does not fit" in reason
    assert report.get("first tokens", "gap_closed") is None and report.get("first tokens", "gold_nll") is not None
    assert "teacher_kl" not in report["first tokens"].items
    assert report.table().count("it does not fit") == 1  # one line for all methods of one reason


def test_held_out_conversations_take_the_place_of_the_text_s_own_answers() -> None:
    row = {"input_ids": [8, 9, 10, 11], "completion_mask": [0, 0, 1, 1], "messages": [{"role": "user", "content": "?"}]}
    bench = Bench(tiny_model(), TOKENIZER, TEXT, 8)
    args = EvaluationConfig(generate=False, speed=False)
    report = evaluate_systems([], bench, questions=QUESTIONS, conversations=[row], baselines=(), args=args)
    assert report["no context"].items["teacher_kl"].weights == [2.0]


def test_a_stopped_evaluation_is_carried_on() -> None:
    bench = Bench(tiny_model(), TOKENIZER, TEXT, 8)
    options: dict[str, Any] = {"questions": QUESTIONS, "baselines": ["first_tokens", "dense"]}
    options["args"] = EvaluationConfig(generate=False, speed=False, bootstrap_samples=20)
    kept: dict[str, Any] = {}

    def stop_after_two(name: str, result: Any) -> None:
        kept[name] = result
        if len(kept) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_systems([], bench, finished=stop_after_two, **options)
    asked: list[str] = []
    report = evaluate_systems([], bench, kept=kept, progress=asked.append, **options)
    assert list(kept) == ["no_context", "full_text"] and asked == ["first_tokens", "dense"]
    assert report.table() == evaluate_systems([], bench, **options).table()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": [{"question": "what ?"}]}, "no question with a gold answer"),
        ({"questions": [{"answer": "yes"}]}, "question 0: a question is empty"),
        ({"questions": [{"question": "?", "options": ["a"], "correct": 3}]}, "`correct=3` is none of the 1"),
        ({"general": [{"prompt": "?"}]}, r"`general\[0\]` needs a `prompt` and an `answer`"),
        ({"baselines": ["rag"]}, "The baseline 'rag' is unknown; there are: no_context"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], message: str) -> None:
    model = tiny_model()
    peft_model = cartridge_model(model, KVPrefix.from_text(model, TOKENIZER, TEXT)[:4])
    with pytest.raises(ValueError, match=message):
        evaluate_cartridge(
            peft_model, TOKENIZER, **{"text": TEXT, "questions": QUESTIONS, "args": ARGS, **changes}
        )  # fmt: skip


def test_bad_settings_are_refused() -> None:
    for wrong in ({"batch_size": 0}, {"max_questions": -1}, {"answer_metrics": ["bleu"]}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
            EvaluationConfig(**wrong)
