"""The share of the in-context gap that is closed."""

from __future__ import annotations

import math

import pytest

from peft_cartridges import KVPrefix, gold_answer_nll, shared_prefix
from peft_cartridges.evaluation import ContextGap, measure_context_gap
from tests.tiny_models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = "the old captain says yes . the new ship is red ."
PAIRS = [{"question": "what is the ship ?", "answer": "the ship is red ."}, {"question": "who ?", "answer": "yes ."}]


def test_the_ends_of_the_scale_are_0_and_1() -> None:
    gap = ContextGap(no_context=5.0, full_context=3.0)
    assert [gap.closed(value) for value in (5.0, 3.5, 3.0, 6.0)] == [0.0, 0.75, 1.0, -0.5]


def test_without_a_gap_there_is_no_share() -> None:
    assert math.isnan(ContextGap(3.0, 3.0).closed(2.0)) and math.isnan(ContextGap(3.0, 4.0).closed(2.0))


def test_the_gap_is_that_of_the_gold_answers() -> None:
    model = tiny_model()
    gap = measure_context_gap(model, TOKENIZER, PAIRS, TEXT)
    assert gap.no_context == pytest.approx(gold_answer_nll(model, TOKENIZER, PAIRS), abs=1e-6)
    with shared_prefix(model, KVPrefix.from_text(model, TOKENIZER, TEXT)):
        full = gold_answer_nll(model, TOKENIZER, PAIRS, in_context=True)
    assert gap.full_context == pytest.approx(full, abs=1e-6) and gap.full_context != gap.no_context


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="`questions` is empty"):
        measure_context_gap(tiny_model(), TOKENIZER, [], TEXT)
    with pytest.raises(ValueError, match="`text` is empty"):
        measure_context_gap(tiny_model(), TOKENIZER, PAIRS, " ")
