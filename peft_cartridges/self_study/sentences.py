"""Where sentences and words end, also in scripts that put no space between them."""

from __future__ import annotations

import itertools

import regex

# Scripts that are written without spaces: each character counts as a word.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_CLOSING = r"[\p{Pe}\p{Pf}\"']*"
# A sentence ends at a mark that Unicode calls one, with the quotes and brackets that close behind it: anywhere, if the
# mark is one of East Asian texts; else in front of a space or of a script without spaces. And at an empty line.
_SENTENCE_END = regex.compile(
    rf"(?:[。！？｡﹖﹗]\p{{Sentence_Terminal}}*{_CLOSING}|\p{{Sentence_Terminal}}+{_CLOSING}(?=[\s{_UNSPACED}]))\s*"
    r"|\n\s*\n\s*"
)
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[^\s{_UNSPACED}]+")


def sentence_ends(text: str) -> list[int]:
    """Character positions between the sentences of a text, behind the space that follows one."""
    return [match.end() for match in _SENTENCE_END.finditer(text) if match.end() < len(text)]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, at least one if there is more than space, each with the space behind it."""
    parts = itertools.pairwise([0, *sentence_ends(text), len(text)])
    return [text[start:end] for start, end in parts if text[start:end].strip()]


def count_words(text: str) -> int:
    """Words, or characters in scripts without spaces."""
    return sum(1 for _ in _WORD.finditer(text))


def first_words(text: str, number: int) -> str:
    """The beginning of a text, up to the end of a word, as counted by `count_words`."""
    match = next(itertools.islice(_WORD.finditer(text), number - 1, None), None)
    return text if match is None else text[: match.end()]


def last_words(text: str, number: int) -> str:
    """The end of a text, from the beginning of a word on."""
    starts = [match.start() for match in _WORD.finditer(text)][-number:]
    return text[starts[0] :].strip() if starts else ""
