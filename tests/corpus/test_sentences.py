"""Sentences and words of texts in several scripts, and recitations of them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_cartridges.corpus.sentences import (
    count_words,
    first_words,
    last_words,
    sentence_ends,
    split_sentences,
)
from peft_cartridges.self_study.prompts import draw_recitation


@pytest.mark.parametrize(
    "sentences",
    [
        ["The light costs 3.50 a day. ", "“Who keeps it?” ", "Ines does! ", "(She always has.) ", "e.g.this stays"],
        ["灯塔建于1962年。", "谁看守它？", "伊内斯说：“是我！”", "价格是3.5元。", "好!", "是吗?", "没有"],
        ["灯台は古い。", "「誰が守るのか。」", "イネスです！"],
        ["المنارة قديمة. ", "من يحرسها؟ ", "إينيس تحرسها منذ عام 1962. ", "نعم"],
        ["یہ مینار پرانا ہے۔ ", "کون اس کی حفاظت کرتا ہے؟ ", "اینس"],
        ["यह प्रकाशस्तंभ पुराना है। ", "कौन देखता है? ", "इनेस"],
        ["# The light\n\n", "It is old\n  \n", "very"],
        ["one sentence without an end"],
    ],
)
def test_sentences_end_where_readers_of_the_script_see_it(sentences: list[str]) -> None:
    assert split_sentences("".join(sentences)) == sentences


@given(st.text(alphabet="a .?!\n海。「」」？ไé\"'"))
def test_nothing_is_lost(text: str) -> None:
    parts = split_sentences(text)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(part.strip() for part in parts)
    assert all(0 < end < len(text) for end in sentence_ends(text))


@given(st.text(alphabet="ab .\n海中ไé"), st.integers(1, 5))
def test_words_are_counted_from_either_end(text: str, number: int) -> None:
    wanted = min(number, count_words(text))
    assert count_words(first_words(text, number)) == wanted and text.startswith(first_words(text, number))
    assert count_words(last_words(text, number)) == wanted and text.rstrip().endswith(last_words(text, number))


def test_words_where_there_are_spaces_and_where_not() -> None:
    assert count_words("The old light. 灯塔建于 1962年") == 3 + 4 + 2
    assert first_words("The old light", 2) == "The old" and last_words("The old light", 2) == "old light"
    assert first_words("灯塔建于", 2) == "灯塔" and last_words("灯塔建于", 1) == "于"


@pytest.mark.parametrize(
    "sentence", ["灯塔的看守人伊内斯每天早上六点擦拭第{}号镜片。", "灯台守のイネスは毎朝{}番の窓を磨きます。", "تنظف إينيس العدسة رقم {} كل صباح؟ "]
)  # fmt: skip
def test_a_recitation_quotes_a_few_sentences_in_any_script(sentence: str) -> None:
    text = "".join(sentence.format(number) for number in range(80))
    answers = set()
    for seed in range(40):
        question, answer = draw_recitation(text, random.Random(seed))
        assert answer in " ".join(text.split()) and 0 < count_words(answer) <= 60
        assert answer[-1] in "。؟" and len(question) < 200
        answers.add(answer)
    assert len(answers) > 20


def test_a_text_without_an_end_is_quoted_in_part() -> None:
    _, answer = draw_recitation("海" * 1600, random.Random(0))
    assert answer == "海" * 60
