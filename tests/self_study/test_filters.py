"""Each filter drops what it is for, and lets the rest pass."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from peft_cartridges import SynthesisConfig
from peft_cartridges.self_study.quality import (
    DEFAULT_FILTERS,
    FILTERS,
    Candidate,
    QualityFilter,
    make_filters,
    register_filter,
)

CHUNK = "The lighthouse at Vorholm was built in 1871. Its keeper, Ansgar Tveit, kept bees in the lamp room."


def _candidate(question: str, answer: str, seed_type: str = "question", ended: Sequence[bool] = (True,)) -> Candidate:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Candidate(messages, CHUNK, seed_type, (ended[0],), (ended[-1],))


def _filter(name: str, **options: float) -> QualityFilter:
    return make_filters([name], **options)[name]


@pytest.mark.parametrize(
    ("name", "question", "answer", "dropped"),
    [
        ("empty", "Who?", " \n", True),
        ("empty", "?!", "Ansgar.", True),
        ("empty", "Who?", "Ansgar.", False),
        ("refusal", "Who?", "I'm sorry, but I can't answer that.", True),
        ("refusal", "Who?", "I’m sorry, but I am unable to help.", True),
        ("refusal", "Who?", "As an AI language model, I have no access to the text.", True),
        ("refusal", "Who?", "I cannot provide that.", True),
        ("refusal", "Who?", "Ansgar Tveit. " + "He kept bees. " * 12 + "“I'm sorry,” he said.", False),
        ("refusal", "Who?", "The keeper cannot see the sea from there.", False),
        ("vague_question", "What is the text above about?", "A lighthouse.", True),
        ("vague_question", "Summarize the main points of this section in a table.", "Bees.", True),
        ("vague_question", "Who was the keeper?", "Ansgar.", False),
        ("vague_question", "What happened in 1871?", "It was built.", False),
        ("vague_question", "Who wrote Hamlet?", "Shakespeare.", True),
    ],
)
def test_a_filter_drops_what_it_is_for(name: str, question: str, answer: str, dropped: bool) -> None:
    assert _filter(name).drops(_candidate(question, answer)) is dropped


def test_cut_turns_are_told_apart() -> None:
    cut_question = _candidate("Who was the", "Ansgar.", ended=(False, True))
    cut_answer = _candidate("Who was it?", "Ansgar and", ended=(True, False))
    assert _filter("truncated_question").drops(cut_question) and not _filter("truncated_question").drops(cut_answer)
    assert _filter("truncated_answer").drops(cut_answer) and not _filter("truncated_answer").drops(cut_question)


def test_recitations_pass_what_is_about_wording() -> None:
    for name in ("refusal", "vague_question"):
        assert not _filter(name).drops(_candidate("Quote “a”.", "I'm sorry, I cannot help.", "recitation"))


def test_a_duplicate_is_the_same_words() -> None:
    one = _filter("duplicate")
    assert not one.drops(_candidate("Who was it?", "Ansgar Tveit."))
    assert one.drops(_candidate("who was it", "Ansgar  Tveit!"))
    assert not one.drops(_candidate("Who was it?", "Ansgar Tveit, the keeper."))
    assert not _filter("duplicate").drops(_candidate("Who was it?", "Ansgar Tveit.")), "filters start anew"


def test_a_near_duplicate_is_mostly_the_same_words() -> None:
    pytest.importorskip("datasketch")
    answer = "Ansgar Tveit was the keeper of the lighthouse at Vorholm, and he kept bees in the lamp room for years."
    one = _filter("near_duplicate", max_similarity=0.6)
    assert not one.drops(_candidate("Who was the keeper of the lighthouse?", answer))
    assert one.drops(_candidate("Who was the keeper of the lighthouse?", f"{answer} Indeed."))
    assert not one.drops(_candidate("When was it built?", "It was built in 1871 by people of whom nothing is known."))
    strict = _filter("near_duplicate", max_similarity=0.99)
    assert not strict.drops(_candidate("Who was the keeper?", answer))
    assert not strict.drops(_candidate("Who was the keeper?", f"{answer} Indeed, nobody else would do such a thing."))


def test_scripts_without_spaces_are_read_by_pairs() -> None:
    chunk = "灯台は一八七一年に建てられた。"
    messages = [{"role": "user", "content": "灯台はいつ?"}, {"role": "assistant", "content": "一八七一年"}]
    assert not _filter("vague_question").drops(Candidate(messages, chunk, "question"))
    messages[0]["content"] = "猫は好きか?"
    assert _filter("vague_question").drops(Candidate(messages, chunk, "question"))


def test_filters_of_ones_own_are_registered() -> None:
    class NoBees(QualityFilter):
        def drops(self, candidate: Candidate) -> bool:
            return "bees" in candidate.answers[0]

    register_filter("no_bees", NoBees)
    try:
        assert "no_bees" in sorted(FILTERS)
        SynthesisConfig(quality_filters=["no_bees"])
        assert _filter("no_bees").drops(_candidate("Who?", "bees"))
        with pytest.raises(ValueError, match="There is a quality filter `no_bees` already"):
            register_filter("no_bees", NoBees)
    finally:
        del FILTERS["no_bees"]
    with pytest.raises(ValueError, match="`quality_filters` has no_bees; there are: duplicate, empty"):
        SynthesisConfig(quality_filters=["no_bees"])


def test_the_default_needs_nothing_that_is_not_installed() -> None:
    assert "near_duplicate" not in DEFAULT_FILTERS
    make_filters(DEFAULT_FILTERS)
