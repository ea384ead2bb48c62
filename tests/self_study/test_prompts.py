"""Seed prompts and recitations."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_cartridges import SynthesisConfig
from peft_cartridges.self_study.prompts import PAPER_TYPES, SEED_PROMPTS, draw_recitation, draw_seed_prompt


def test_the_types_are_those_of_the_paper() -> None:
    assert set(PAPER_TYPES) == {"structuring", "summarization", "question", "use_case", "creative"}


@pytest.mark.parametrize("seed_type", PAPER_TYPES)
def test_every_phrasing_is_filled_in_and_can_be_drawn(seed_type: str) -> None:
    rng = random.Random(0)
    drawn = {draw_seed_prompt(seed_type, rng) for _ in range(300)}
    assert len(drawn) >= len(SEED_PROMPTS[seed_type])
    assert not any("{" in prompt for prompt in drawn)
    assert "the old ship" in draw_seed_prompt(seed_type, rng, passage="the old ship")


@given(st.text(min_size=1).filter(lambda text: text.strip()), st.integers())
def test_a_recitation_is_a_passage_of_the_text(text: str, seed: int) -> None:
    question, answer = draw_recitation(text, random.Random(seed), max_words=20)
    assert answer and len(answer.split()) <= 20
    assert answer in " ".join(text.split())
    assert question


def test_recitations_reach_every_sentence() -> None:
    text = " ".join(f"Sentence number {number} is here." for number in range(30))
    answers = " ".join(draw_recitation(text, random.Random(seed))[1] for seed in range(200))
    assert all(f"number {number} is" in answers for number in range(30))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_conversations": 0}, "`num_conversations` must be at least 1"),
        ({"min_chunk_tokens": 9, "max_chunk_tokens": 8}, "`max_chunk_tokens` .* is below `min_chunk_tokens`"),
        ({"recitation_share": 1.5}, "`recitation_share` must be between 0 and 1"),
        ({"answer_temperature": -1}, "`answer_temperature` must not be negative"),
        ({"thoughts": "hide"}, "`thoughts` is 'hide'; there are: skip, drop, learn"),
        ({"seed_types": ["question", "riddle"]}, "`seed_types` has .*riddle.*; there are: structuring"),
        ({"engine": "llama.cpp"}, "`engine` is 'llama.cpp'; there are: transformers, vllm, openai"),
        ({"engine": "openai"}, "`base_url` is missing"),
        ({"engine_options": "[1]"}, "`engine_options` must be a mapping"),
        ({"teacher_targets": "logits"}, "`teacher_targets` is 'logits'; there are: hidden_states, top_k, live"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SynthesisConfig(**options)
