"""Instructions, contamination and abstention, by hand."""

from __future__ import annotations

import pytest

from peft_cartridges.chat import ChatCodec
from peft_cartridges.evaluation.abstention import SENTENCE, abstention_nll, declines, separation, with_request
from peft_cartridges.evaluation.contamination import distinctive_words, leaks
from peft_cartridges.evaluation.instructions import (
    RULES,
    Instruction,
    follows,
    instructions_from_rows,
    make_instructions,
)
from peft_cartridges.evaluation.scoring import row_of_answer, score_rows
from peft_cartridges.evaluation.system import bare_system
from tests.tiny_models import tiny_model, tiny_tokenizer

# Rule -> (arguments, an answer that keeps it, one that does not)
CASES = {
    "keywords:existence": ({"keywords": ["sea", "ship"]}, "A Ship at sea", "a ship"),
    "keywords:forbidden_words": ({"forbidden_words": ["sea"]}, "the seaman", "the sea."),
    "keywords:frequency": ({"keyword": "sea", "frequency": 2, "relation": "at least"}, "sea and Sea", "sea"),
    "keywords:letter_frequency": ({"letter": "a", "let_frequency": 2, "let_relation": "less than"}, "a bc", "A a"),
    "length_constraints:number_words": ({"num_words": 3, "relation": "less than"}, "two words", "now three words"),
    "length_constraints:number_sentences": ({"num_sentences": 2, "relation": "at least"}, "One. Two!", "One, two."),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{a: 1}"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* one\n- two", "* one\ntwo"),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*one* and **two**", "* one\n* two"),
    "detectable_format:title": ({}, "<<The sea>>\nIt is blue.", "<<>> <The sea>"),
    "detectable_content:number_placeholders": ({"num_placeholders": 1}, "Dear [name],", "Dear name,"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "So long. P.S. Write!", "So long."),
    "change_case:english_lowercase": ({}, "all low, 7", "Not all"),
    "change_case:english_capital": ({}, "ALL HIGH, 7", "NOT all"),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 1, "capital_relation": "at least"},
        "The SEA",
        "The S",
    ),
    "punctuation:no_comma": ({}, "one and two", "one, two"),
    "startend:end_checker": ({"end_phrase": "That is all."}, "So it is. that is all.\n", "That is all. Or not."),
    "startend:quotation": ({}, ' "quoted" ', '"half'),
    "combination:two_responses": ({}, "one\n******\ntwo", "one\n******\none"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "What is it?"}, "What is it? It is.", "It is."),
}


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize("rule", CASES)
def test_rules(rule: str) -> None:
    arguments, kept, broken = CASES[rule]
    instruction = Instruction("?", (rule,), ({**arguments, "unused": None},))
    assert follows(kept, instruction) == 1.0
    assert follows(broken, instruction) == 0.0
    assert follows("", instruction) == 0.0


def test_the_share_of_the_rules_that_are_kept() -> None:
    both = Instruction("?", ("punctuation:no_comma", "change_case:english_lowercase"))
    assert [follows(answer, both) for answer in ("all low", "Low", "One, two")] == [1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="'made:up' is unknown"):
        follows("a", Instruction("?", ("made:up",)))
    with pytest.raises(ValueError, match="does not take"):
        follows("a", Instruction("?", ("punctuation:no_comma",), ({"num_words": 1},)))


def test_rows_in_the_form_of_ifeval() -> None:
    rows = [
        {"prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]},
        {"prompt": "b", "instruction_id_list": ["language:response_language"], "kwargs": [{"language": "de"}]},
    ]
    (only,) = instructions_from_rows(rows)
    assert only.prompt == "a" and follows("no", only) == 1.0
    with pytest.raises(ValueError, match="no instruction whose rules"):
        instructions_from_rows(rows[1:])
    with pytest.raises(ValueError, match="instruction 0 lacks instruction_id_list"):
        instructions_from_rows([{"prompt": "a"}])


def test_made_instructions_say_their_rule() -> None:
    made = make_instructions(["Name a tree."] * 9)
    assert made[0].prompt == "Name a tree. Answer in lowercase letters only." and made[0] == made[8]
    assert len({instruction.rules for instruction in made}) == 8
    assert all(rule in RULES for instruction in made for rule in instruction.rules)


def test_contamination_counts_answers_with_words_that_only_the_text_has() -> None:
    text = "The keeper of Vorrel Rock feeds the goats. The sea is cold."
    distinctive = distinctive_words(text, ["What feeds a rock band?", "cold water"])
    assert distinctive == {"keeper", "vorrel", "goats"}  # "sea" is too short to say anything
    assert leaks(["A keeper, of course.", "Goat or sheep", "VORREL"], distinctive) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The text does not say.", 1.0), ("It isn’t mentioned there.", 1.0), ("No information is given.", 1.0),
        ("This is not specified", 1.0), ("I don't know", 1.0), ("He says no.", 0.0), ("The sea is blue.", 0.0), ("", 0.0),
    ],
)  # fmt: skip
def test_what_declines(answer: str, expected: float) -> None:
    assert declines(answer) == expected


def test_separation_is_the_share_of_pairs_in_the_right_order() -> None:
    assert separation([3.0, 2.0], [1.0]) == 1.0
    assert separation([3.0, 1.0], [2.0, 1.0]) == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert separation([1.0], [2.0]) == 0.0
    with pytest.raises(ValueError, match="both answerable and unanswerable"):
        separation([], [1.0])


def test_abstention_is_the_likelihood_of_saying_so() -> None:
    system = bare_system(tiny_model(), ChatCodec(None, tiny_tokenizer()))
    row = row_of_answer(system.codec, with_request("who ?"), SENTENCE)
    (score,) = score_rows(system, [row])
    assert abstention_nll(system, ["who ?"]) == [pytest.approx(score.nll / score.tokens)]
