"""What is dropped is counted and made anew; the most useful conversations are kept."""

from __future__ import annotations

import pytest
import torch

from peft_cartridges.chat import encode_context, encode_preamble
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
    contents = [str(row["messages"]) for row in dataset]
    assert len(set(contents)) == len(contents)


def test_usefulness_is_the_kl_of_the_teacher_with_and_without_the_chunk() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model()
    dataset = runs.synthesize(None, num_conversations=4, min_usefulness=1e-6)
    for row in dataset:
        front = len(encode_preamble(tokenizer))
        context = encode_context(tokenizer, row["context"])
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
