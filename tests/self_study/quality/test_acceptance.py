"""What is dropped is counted and made anew; the most useful conversations are kept."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from peft_cartridges.chat import ChatCodec
from peft_cartridges.self_study import format_report, read_report
from peft_cartridges.self_study.quality import Candidate, QualityFilter, register_filter
from peft_cartridges.self_study.quality.registry import _FILTERS
from tests.self_study import runs
from tests.tiny_models import tiny_model, tiny_tokenizer


class _EverySecond(QualityFilter):
    def __init__(self) -> None:
        self.number = 0

    def drops(self, candidate: Candidate) -> bool:
        self.number += 1
        return self.number % 2 == 0


@pytest.fixture()
def every_second() -> object:
    register_filter("every_second", _EverySecond)
    yield "every_second"
    del _FILTERS["every_second"]


def test_dropped_conversations_are_made_anew_and_counted(every_second: str) -> None:
    options = {"num_conversations": 8, "conversations_per_chunk": 4, "quality_filters": [every_second]}
    told = read_report(runs.synthesize(None, max_attempts=8, **options))["report"]
    assert told["kept"] == 8 and told["dropped"] == {"every_second": told["made"] - 8} and told["made"] >= 14
    once = runs.synthesize(None, max_attempts=1, **options)
    report = read_report(once)["report"]
    assert len(once) == 4 and report["made"] == 8 and report["acceptance"] == 0.5
    text = format_report(read_report(once))
    assert "4 conversations kept of 8 made (50%)" in text and "dropped, every_second: 4" in text
    assert "doc0: " in text and "tokens generated about 2 chunks" in text
    assert "Chunks by what was kept of them: all 0, half or more 2, less 0, none 0" in text
    first = report["per_chunk"][0]
    assert f"  doc0, tokens {first['start']}–{first['end']}: 2 of 4 (every_second 2)\n" in text


def test_each_chunk_has_a_row_of_what_was_made_kept_and_dropped(every_second: str) -> None:
    dataset = runs.synthesize(
        None, num_conversations=14, conversations_per_chunk=4, quality_filters=[every_second, "truncated_question"]
    )
    report = read_report(dataset)["report"]
    rows = report["per_chunk"]
    assert len(rows) == report["chunks"] == 4
    for row in rows:
        assert row["id"] == f"{row['document']}:{row['start']}-{row['end']}"
        assert row["kept"] == dataset["chunk_id"].count(row["id"]) == row["made"] - sum(row["dropped"].values())
    assert sum((Counter(row["dropped"]) for row in rows), Counter()) == report["dropped"]
    assert set(report["dropped"]) == {"every_second", "truncated_question"}
    for name in ("made", "kept"):
        assert sum(row[name] for row in rows) == report[name]


def test_the_report_for_people_stays_short_and_begins_with_the_worst_chunks() -> None:
    rows = [
        {"id": "", "document": "d" * 200, "start": number, "end": number + 9, "made": 10, "kept": kept,
         "dropped": {"refusal": 10 - kept} if kept < 10 else {}}
        for number, kept in enumerate([10, 9, 5, 4, 0, 1] * 500)
    ]  # fmt: skip
    cover = {"covered": 1.0, "num_tokens": 9, "fewest": 1, "mean": 1.0, "most": 1}
    report = {
        "made": 30_000, "kept": 14_500, "dropped": {"refusal": 15_500}, "acceptance": 0.48, "generated_tokens": 1,
        "chunks": len(rows), "coverage": {f"{'d' * 200}{number}": cover for number in range(300)}, "per_chunk": rows,
    }  # fmt: skip
    lines = format_report({"report": report}).splitlines()
    assert "Chunks by what was kept of them: all 500, half or more 1000, less 1000, none 500" in lines
    worst = [line for line in lines if "tokens 4–" in line or "tokens 10–" in line or "tokens 16–" in line]
    assert len(worst) == 3 and all(line.endswith(": 0 of 10 (refusal 10)") for line in worst)
    assert len(lines) < 40 and max(map(len, lines)) < 150


def test_nothing_kept_is_an_error_that_says_why() -> None:
    with pytest.raises(ValueError, match=r"No conversation of 6 was kept \({'truncated_answer': 6}\)"):
        runs.synthesize(
            None, num_conversations=2, quality_filters=["truncated_answer"], max_answer_tokens=1, max_attempts=3
        )


def test_duplicates_in_two_chunks_are_found_in_the_end() -> None:
    # Recitations of a text that is all one sentence: every chunk of it gives the same.
    args = runs.settings(
        num_conversations=6, conversations_per_chunk=1, min_chunk_tokens=500, max_chunk_tokens=500, recitation_share=1.0
    )
    text = " ".join(["the sea is blue"] * 80)
    dataset = runs.SelfStudySynthesizer(None or tiny_model(), tiny_tokenizer(), args).synthesize(text)
    report = read_report(dataset)["report"]
    assert report["dropped"]["duplicate"] > 0
    assert report["kept"] == len(dataset) == 6 - report["dropped"]["duplicate"]
    assert sum(row["kept"] for row in report["per_chunk"]) == len(dataset)
    assert [row["made"] - row["dropped"].get("duplicate", 0) for row in report["per_chunk"]] == [
        row["kept"] for row in report["per_chunk"]
    ]
    contents = [str(row["messages"]) for row in dataset]
    assert len(set(contents)) == len(contents)


def test_usefulness_is_the_kl_of_the_teacher_with_and_without_the_chunk() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model()
    dataset = runs.synthesize(None, num_conversations=4, min_usefulness=1e-6)
    for row in dataset:
        front = len(ChatCodec(None, tokenizer).preamble)
        context = ChatCodec(None, tokenizer).encode_context(row["context"])
        learned = torch.tensor(row["completion_mask"][1:], dtype=torch.bool)
        with torch.no_grad():
            without = model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)[:-1][learned]
            teacher = model(torch.tensor([context + row["input_ids"][front:]])).logits[0]
        teacher = teacher[len(context) - front :].double().log_softmax(-1)[:-1][learned]
        expected = (teacher.exp() * (teacher - without)).sum(-1).mean().item()
        assert row["usefulness"] == pytest.approx(expected, rel=1e-3)


def test_the_most_useful_are_kept_and_the_useless_dropped() -> None:
    plain = runs.synthesize(None, num_conversations=8, conversations_per_chunk=8, min_usefulness=1e-6)
    best = runs.synthesize(None, num_conversations=8, conversations_per_chunk=8, oversampling=4.0)
    assert len(best) == 8
    assert sum(best["usefulness"]) > sum(plain["usefulness"])
    report = read_report(best)["report"]
    assert report["made"] == 32 and report["dropped"]["less_useful"] >= 20
    middle = sorted(plain["usefulness"])[4]
    some = runs.synthesize(None, num_conversations=8, conversations_per_chunk=8, min_usefulness=middle, max_attempts=1)
    assert min(some["usefulness"]) >= middle * (1 - 1e-6)
    assert read_report(some)["report"]["dropped"]["not_useful"] == 8 - len(some) > 0
    assert "usefulness" not in runs.synthesize(None, num_conversations=2).column_names
