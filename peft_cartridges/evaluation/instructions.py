"""Instructions whose following a program can check: IFEval's rules (arXiv 2311.07911), written anew from their names
and arguments in the data set `google/IFEval`.

What is left out: `language:response_language`, which needs a language detector, and `detectable_format:constrained_response`,
`multiple_sections`, `nth_paragraph_first_word`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..corpus.sentences import split_sentences


@dataclass(frozen=True)
class Instruction:
    """A prompt and the rules that an answer to it must keep.

    Args:
        prompt: With the rules in words.
        rules: Names of rules, as `instruction_id_list` of IFEval.
        arguments: Of each rule, as `kwargs` of IFEval (missing ones may be `None`).
    """

    prompt: str
    rules: tuple[str, ...]
    arguments: tuple[dict[str, Any], ...] = field(default=())


def _compare(count: int, number: int, relation: str | None) -> bool:
    """IFEval knows two relations."""
    if relation == "less than":
        return count < number
    if relation == "at least":
        return count >= number
    raise ValueError(f"the relation {relation!r} is none of 'less than', 'at least'.")


def _has(answer: str, word: str) -> bool:
    return re.search(re.escape(word), answer, re.IGNORECASE) is not None


def _is_json(answer: str) -> bool:
    text = re.sub(r"^```(?:json)?|```$", "", answer.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _paragraphs(answer: str, separator: str) -> list[str]:
    return [part for part in answer.split(separator) if part.strip()]


# Rule -> check(answer, its arguments)
RULES: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda answer, keywords: all(_has(answer, word) for word in keywords),
    "keywords:forbidden_words": lambda answer, forbidden_words: (
        not any(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE) for word in forbidden_words)
    ),
    "keywords:frequency": lambda answer, keyword, frequency, relation: _compare(
        len(re.findall(re.escape(keyword), answer, re.IGNORECASE)), frequency, relation
    ),
    "keywords:letter_frequency": lambda answer, letter, let_frequency, let_relation: _compare(
        answer.lower().count(letter.lower()), let_frequency, let_relation
    ),
    "length_constraints:number_words": lambda answer, num_words, relation: _compare(
        len(re.findall(r"\w+", answer)), num_words, relation
    ),
    "length_constraints:number_sentences": lambda answer, num_sentences, relation: _compare(
        len(split_sentences(answer)), num_sentences, relation
    ),
    "length_constraints:number_paragraphs": lambda answer, num_paragraphs: (
        len(_paragraphs(answer, "***")) == num_paragraphs
    ),
    "detectable_format:json_format": _is_json,
    "detectable_format:number_bullet_lists": lambda answer, num_bullets: (
        len(re.findall(r"^\s*[*-]\s+\S", answer, re.MULTILINE)) == num_bullets
    ),
    "detectable_format:number_highlighted_sections": lambda answer, num_highlights: (
        len(re.findall(r"(?<!\*)\*[^\s*][^\n*]*\*(?!\*)|\*\*[^\n*]+\*\*", answer)) >= num_highlights
    ),
    "detectable_format:title": lambda answer: re.search(r"<<[^\n<>]*\S[^\n<>]*>>", answer) is not None,
    "detectable_content:number_placeholders": lambda answer, num_placeholders: (
        len(re.findall(r"\[[^\]\n]+\]", answer)) >= num_placeholders
    ),
    "detectable_content:postscript": lambda answer, postscript_marker: _has(answer, postscript_marker),
    "change_case:english_lowercase": lambda answer: bool(answer.strip()) and answer == answer.lower(),
    "change_case:english_capital": lambda answer: bool(answer.strip()) and answer == answer.upper(),
    "change_case:capital_word_frequency": lambda answer, capital_frequency, capital_relation: _compare(
        len(re.findall(r"\b[A-Z]{2,}\b", answer)), capital_frequency, capital_relation
    ),
    "punctuation:no_comma": lambda answer: "," not in answer,
    "startend:end_checker": lambda answer, end_phrase: answer.strip().strip('"').lower().endswith(end_phrase.lower()),
    "startend:quotation": lambda answer: len(answer.strip()) > 1 and answer.strip()[0] == answer.strip()[-1] == '"',
    "combination:two_responses": lambda answer: (
        len({part.strip() for part in _paragraphs(answer, "******")}) == len(_paragraphs(answer, "******")) == 2
    ),
    "combination:repeat_prompt": lambda answer, prompt_to_repeat: (
        answer.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
}


def follows(answer: str, instruction: Instruction) -> float:
    """The share of the instruction's rules that an answer keeps; an empty answer keeps none.

    Raises:
        ValueError: a rule is unknown, or lacks an argument.
    """
    if not answer.strip():
        return 0.0
    arguments = instruction.arguments or tuple({} for _ in instruction.rules)
    kept = []
    for rule, given in zip(instruction.rules, arguments, strict=True):
        if rule not in RULES:
            raise ValueError(f"the rule {rule!r} is unknown; there are: {', '.join(sorted(RULES))}.")
        present = {name: value for name, value in given.items() if value is not None}
        try:
            kept.append(RULES[rule](answer, **present))
        except TypeError as error:
            raise ValueError(f"the rule {rule!r} does not take {sorted(present)}: {error}") from error
    return sum(kept) / len(kept)


def instructions_from_rows(rows: Sequence[dict[str, Any]]) -> list[Instruction]:
    """Rows in IFEval's form (`prompt`, `instruction_id_list`, `kwargs`); those with a rule that is left out here are
    skipped.

    Raises:
        ValueError: a row lacks a field, or no row is left.
    """
    found = []
    for number, row in enumerate(rows):
        if missing := {"prompt", "instruction_id_list"} - row.keys():
            raise ValueError(f"instruction {number} lacks {', '.join(sorted(missing))}.")
        rules = tuple(row["instruction_id_list"])
        if rules and all(rule in RULES for rule in rules):
            found.append(Instruction(row["prompt"], rules, tuple(dict(given) for given in row.get("kwargs") or ())))
    if not found:
        raise ValueError("there is no instruction whose rules can be checked.")
    return found


# Rules that go with any request, and their words.
_PLAIN: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("change_case:english_lowercase", "Answer in lowercase letters only.", {}),
    ("punctuation:no_comma", "Do not use any commas.", {}),
    ("length_constraints:number_words", "Answer in less than 20 words.", {"num_words": 20, "relation": "less than"}),
    ("detectable_format:title", "Begin with a title in double angular brackets, such as <<title>>.", {}),
    ("startend:quotation", "Wrap your whole answer in double quotation marks.", {}),
    ("detectable_format:number_bullet_lists", "Answer with exactly 2 bullet points (* point).", {"num_bullets": 2}),
    ("startend:end_checker", "End with the words: That is all.", {"end_phrase": "That is all."}),
    ("change_case:english_capital", "Answer in capital letters only.", {}),
)


def make_instructions(prompts: Sequence[str]) -> list[Instruction]:
    """Each prompt with one plain rule, in turn: for machines that cannot reach `google/IFEval`."""
    turns = (_PLAIN[number % len(_PLAIN)] for number in range(len(prompts)))
    return [
        Instruction(f"{prompt.strip()} {words}", (rule,), (dict(arguments),))
        for prompt, (rule, words, arguments) in zip(prompts, turns, strict=True)
    ]
