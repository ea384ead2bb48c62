"""When a cartridge has paid for its training."""

from __future__ import annotations

import math

import pytest

from peft_cartridges.evaluation import BreakEven, training_tokens


def test_conversations_and_tokens_until_it_pays() -> None:
    cost = BreakEven(making=600.0, reading_text=4.0, text_tokens=3000, loading_cartridge=0.5)
    assert cost.conversations == 172  # 600 / 3.5 = 171.4
    assert cost.making <= cost.conversations * (4.0 - 0.5)
    assert cost.tokens == 172 * 3000


def test_a_cartridge_that_saves_nothing_never_pays() -> None:
    assert math.isinf(BreakEven(600.0, 0.5, 100, loading_cartridge=0.5).conversations)
    assert math.isinf(BreakEven(600.0, 0.5, 100, loading_cartridge=0.5).tokens)


def test_costs_must_make_sense() -> None:
    with pytest.raises(ValueError, match="`making` must not be negative"):
        BreakEven(-1.0, 1.0, 100)
    with pytest.raises(ValueError, match="`text_tokens` must be at least 1"):
        BreakEven(1.0, 1.0, 0)


def test_tokens_of_self_study() -> None:
    found = training_tokens(question_tokens=10, answer_tokens=20, chunk_tokens=100, input_tokens=40, epochs=3)
    assert found == 100 + (10 + 20) + (10 + 20) + 2 * 3 * 40
