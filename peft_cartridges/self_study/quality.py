"""What makes a conversation not worth training on: one small class for each reason, and the table of them.

A new filter is a class here (or `register_filter`, in code outside this package) and a row in `FILTERS`.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Cut answers are kept by default: the teacher's distribution is as good on the first half of an answer as on a whole.
DEFAULT_FILTERS = ("empty", "refusal", "duplicate")


@dataclass(frozen=True)
class Candidate:
    """A conversation as filters see it.

    Args:
        messages: User and assistant in turns, each with `role` and `content`.
        context: The chunk; empty off context.
        seed_type: What the conversation began with; a `recitation`'s answer is a passage of the chunk.
        questions_ended, answers_ended: For each turn, whether the model ended it (or it was cut at its longest).
    """

    messages: Sequence[Mapping[str, str]]
    context: str
    seed_type: str
    questions_ended: Sequence[bool] = ()
    answers_ended: Sequence[bool] = ()

    @property
    def questions(self) -> list[str]:
        return [message["content"] for message in self.messages[0::2]]

    @property
    def answers(self) -> list[str]:
        return [message["content"] for message in self.messages[1::2]]


class QualityFilter(ABC):
    """A reason to drop a conversation.

    Filters are made anew for each chunk. One that remembers what it let pass (`compares = True`) is also run over the
    kept conversations of all chunks in the end.
    """

    compares = False

    @abstractmethod
    def drops(self, candidate: Candidate) -> bool:
        """Whether the conversation is to be dropped."""


class Empty(QualityFilter):
    """Drops a conversation with a question or an answer that holds no letter and no digit."""

    def drops(self, candidate: Candidate) -> bool:
        return not candidate.messages or any(
            not any(character.isalnum() for character in message["content"]) for message in candidate.messages
        )


class TruncatedQuestion(QualityFilter):
    """Drops a conversation with a question that the model did not end within `max_question_tokens`."""

    def drops(self, candidate: Candidate) -> bool:
        return not all(candidate.questions_ended)


class TruncatedAnswer(QualityFilter):
    """Drops a conversation with an answer that the model did not end within `max_answer_tokens`."""

    def drops(self, candidate: Candidate) -> bool:
        return not all(candidate.answers_ended)


_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:very |really |so )?(?:sorry|unable|not able|afraid)"
    r"|i (?:can(?:'|no)t|could not|couldn't|do not|don't|am not able to) "
    r"(?:help|assist|answer|provide|access|see|fulfill|comply|comment"
    r"|have (?:access|the ability|any information|enough))"
    r"|as an? (?:ai|artificial intelligence|language model)"
    r"|i apologi[sz]e"
    r"|my apologies"
    r"|unfortunately,? i (?:can|do|am|don))",
    re.IGNORECASE,
)

# A refusal says so at once; "I'm sorry, said the captain" further on is a quotation.
_BEGINNING = 120


class Refusal(QualityFilter):
    """Drops a conversation with an answer that begins by declining (in English). Recitations pass: they quote; and so do
    conversations off context, in which the model is to stay as it is."""

    def drops(self, candidate: Candidate) -> bool:
        if candidate.seed_type == "recitation" or not candidate.context:
            return False
        return any(_REFUSAL.search(answer[:_BEGINNING].replace("’", "'")) for answer in candidate.answers)


class Duplicate(QualityFilter):
    """Drops a conversation with the questions and answers of an earlier one; case and punctuation do not count."""

    compares = True

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def drops(self, candidate: Candidate) -> bool:
        text = "\n".join(" ".join(words(message["content"])) for message in candidate.messages)
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()  # of 100,000 conversations a few megabytes
        known = digest in self._seen
        self._seen.add(digest)
        return known


def words(text: str) -> list[str]:
    """The words and numbers of a text, in lower case."""
    return re.findall(r"\w+", text.lower())


_PERMUTATIONS = 128


class NearDuplicate(QualityFilter):
    """Drops a conversation whose three-word runs are those of an earlier one to a share of `max_similarity`.

    MinHash with locality-sensitive hashing, by `datasketch`: an estimate, with an error of about 0.05.

    Raises:
        ValueError: `datasketch` is not installed.
    """

    compares = True

    def __init__(self, max_similarity: float = 0.8) -> None:
        try:
            from datasketch import MinHashLSH
        except ImportError:
            raise ValueError(
                "The filter `near_duplicate` needs `datasketch`: pip install 'peft-cartridges[quality]'."
            ) from None
        # The index proposes, the sketches decide: its threshold is set so that it misses few.
        threshold = min(max(max_similarity, 0.1), 0.9)
        self._index: Any = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, weights=(0.2, 0.8))
        self._sketches: list[Any] = []
        self.max_similarity = max_similarity

    def drops(self, candidate: Candidate) -> bool:
        from datasketch import MinHash

        found = words(" ".join(message["content"] for message in candidate.messages))
        runs = {" ".join(found[i : i + 3]) for i in range(max(1, len(found) - 2))}
        sketch = MinHash(num_perm=_PERMUTATIONS, seed=1)
        sketch.update_batch([run.encode() for run in sorted(runs)])
        if any(sketch.jaccard(self._sketches[like]) >= self.max_similarity for like in self._index.query(sketch)):
            return True
        self._index.insert(len(self._sketches), sketch)
        self._sketches.append(sketch)
        return False


# Words that are as much at home in a question about any other text.
_ANYWHERE = frozenset(
    words("""
    about above according after again also another answer answers article asked author because been before being
    below between both briefly chapter characters complete content could create data describe described describes
    detail details different discuss document does each event events example examples explain explained fact facts
    find first five following form format four from give given have help here idea important include included
    information into key kind last least like list listed main make many mean mentioned message more most much name
    named names need number numbers only order other outline over overall paragraph part parts passage people person
    piece place please point points provide question questions read request role said same says second section
    sections sentence sentences several short should show simple some something specific story subject such
    summarize summary table tell text than that their them then there these they thing things this those three
    time times title topic topics under used using want were what when where which while whole will with within
    words work would write written your json yaml markdown bullet bulleted numbered timeline
    """)
)
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]")  # kana, Han, Thai: scripts without spaces


class VagueQuestion(QualityFilter):
    """Drops a conversation whose first question shares no telling word with the chunk ("What is the text about?"):
    without the text in front nobody could know what is asked, and the cartridge learns nothing of the chunk from it.

    Telling are words of four letters and more, and numbers, that are not at home in any question (an English list);
    in scripts without spaces, pairs of characters.
    """

    def drops(self, candidate: Candidate) -> bool:
        if not candidate.messages or candidate.seed_type == "recitation" or not candidate.context:
            return False
        return not (telling_terms(candidate.questions[0]) & telling_terms(candidate.context))


def telling_terms(text: str) -> set[str]:
    """Words, numbers and (in scripts without spaces) pairs of characters that can tell what a text is about."""
    terms: set[str] = set()
    for word in words(text):
        if _UNSPACED.search(word):
            terms.update(word[i : i + 2] for i in range(len(word) - 1))
        elif any(character.isdigit() for character in word) or (len(word) >= 4 and word not in _ANYWHERE):
            terms.add(word)
    return terms


# Name -> what makes a filter of `max_similarity`, which most have no use for.
FILTERS: dict[str, Callable[[float], QualityFilter]] = {
    "empty": lambda similarity: Empty(),
    "truncated_question": lambda similarity: TruncatedQuestion(),
    "truncated_answer": lambda similarity: TruncatedAnswer(),
    "refusal": lambda similarity: Refusal(),
    "duplicate": lambda similarity: Duplicate(),
    "near_duplicate": NearDuplicate,
    "vague_question": lambda similarity: VagueQuestion(),
}


def register_filter(name: str, make: Callable[[], QualityFilter]) -> None:
    """Enters a filter of your own.

    Raises:
        ValueError: the name is taken.
    """
    if name in FILTERS:
        raise ValueError(f"There is a quality filter `{name}` already: choose another name.")
    FILTERS[name] = lambda similarity: make()


def check_filters(names: Sequence[str]) -> None:
    """Raises:
    ValueError: a name is unknown.
    """
    if unknown := [name for name in names if name not in FILTERS]:
        raise ValueError(f"`quality_filters` has {', '.join(unknown)}; there are: {', '.join(sorted(FILTERS))}.")


def make_filters(names: Sequence[str], *, max_similarity: float = 0.8) -> dict[str, QualityFilter]:
    """New filters, in the order of `names`; the first that drops a conversation is the reason that is reported."""
    check_filters(names)
    return {name: FILTERS[name](max_similarity) for name in names}
