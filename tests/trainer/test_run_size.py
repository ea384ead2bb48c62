"""Sizes by arithmetic: budgets, learning rates, conversations of chunks."""

from __future__ import annotations

import pytest

from peft_cartridges import SynthesisConfig
from peft_cartridges.self_study.sizes import conversations_of_chunks, default_conversations
from peft_cartridges.trainer.run_size import RunSize, default_learning_rate, fit_into, parse_budget


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("1.5h", 5400), ("1h30m", 5400), (30, 30), ("2M", 120)]
)
def test_a_budget_is_a_time(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "5 minutes", "m5", "-3m", "0", "5m!"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"`budget` is .* give a time, for instance 90s, 5m or 1h30m"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("corpus", "tokens", "rate"),
    [(4000, 800, 0.04), (4000, 400, 0.04), (6000, 400, 0.06), (8000, 400, 0.08), (80_000, 400, 0.08), (None, 8, 0.04)],
)
def test_a_shorter_cartridge_learns_faster(corpus: int | None, tokens: int, rate: float) -> None:
    assert default_learning_rate(corpus, tokens) == pytest.approx(rate)


def _fit(seconds: float, **options: object) -> RunSize:
    defaults: dict[str, object] = {
        "per_conversation": 0.5, "per_step": 2.0, "conversations": 1536, "rows_per_step": 16, "off_context_share": 0.04
    }  # fmt: skip
    return fit_into(seconds, **{**defaults, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [60, 300, 700, 1400])
def test_all_of_a_budget_is_used_and_no_more(seconds: float) -> None:
    size = _fit(seconds)
    spent = size.num_conversations * 0.5 + size.max_steps * 2
    # Each of the conversations is learned three times, the general ones too.
    assert size.max_steps == pytest.approx(size.num_conversations / 0.96 * 3 / 16, abs=1)
    assert 0.88 * seconds < spent <= 0.92 * seconds


def test_with_time_to_spare_no_more_is_made_than_without_a_budget() -> None:
    assert _fit(1e6) == RunSize(1536, 300)


def test_what_is_given_stands() -> None:
    assert _fit(300, fixed_conversations=True, conversations=400) == RunSize(400, (276 - 200) // 2)
    assert _fit(300, fixed_steps=100) == RunSize((276 - 200) * 2, 100)
    assert _fit(300, fixed_steps=1000) == RunSize(32, 1000)


def test_what_is_there_costs_its_steps_alone() -> None:
    size = _fit(300, made=256)
    spent = (size.num_conversations - 256) * 0.5 + size.max_steps * 2
    assert size.num_conversations > _fit(300).num_conversations and 260 < spent <= 276
    assert _fit(10, made=256).num_conversations == 256


@pytest.mark.parametrize("seconds", [-5, 0, 1])
def test_too_small_a_budget_gives_the_smallest_run(seconds: float) -> None:
    assert _fit(seconds) == RunSize(32, 1)


@pytest.mark.parametrize(("tokens", "number"), [(300, 512), (5120, 512), (15_354, 1536), (484_000, 48_400)])
def test_longer_texts_get_more_conversations(tokens: int, number: int) -> None:
    assert default_conversations(tokens) == number


def _chunks(number: int | None, *lengths: int, **options: int) -> list[int]:
    args = SynthesisConfig(num_conversations=number, **options)
    return conversations_of_chunks(args, {str(place): length for place, length in enumerate(lengths)})


def test_a_corpus_is_covered_before_a_chunk_gets_all_of_its_conversations() -> None:
    assert _chunks(512, 4_000) == [32] * 16
    assert _chunks(512, 15_360) == [16] * 32
    assert _chunks(960, 15_360) == [24] * 40
    assert _chunks(None, 15_360) == [32] * 48
    # A document has at least one chunk, however short it is.
    assert _chunks(512, *[100] * 100) == [16] * 32
    assert _chunks(5, 4_000, conversations_per_chunk=2) == [2, 2, 1]


def test_a_larger_set_extends_a_smaller_one() -> None:
    before: list[int] = []
    for number in range(1, 1_600, 7):
        now = _chunks(number, 15_360)
        assert sum(now) == number and max(now) <= 32
        assert len(now) >= len(before) and all(a >= b for a, b in zip(now, before, strict=False))
        before = now


def test_states_alone_have_a_learning_rate() -> None:
    assert default_learning_rate(360, 0) == default_learning_rate(None, 8) == 0.04
