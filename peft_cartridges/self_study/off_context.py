"""General conversations, whose teacher has no text in its context: they keep a cartridge from changing what has nothing
to do with its text. The model answers requests that come with this package, and beyond these asks itself; or they are a data
set of the user's.

Mixing such rows into a cartridge's training is not in the paper; Cartridges++ describes the harm without them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import load_dataset

from ..chat import ChatCodec
from ..gate import GENERAL_REQUESTS
from ..hub_errors import hub_errors
from .conversation import Conversation, Plan, Turn
from .prompts import GENERAL_FOLLOW_UPS, draw_general_prompt
from .synthesis_config import SynthesisConfig

# Seed type of those that the model writes, and of those of a data set.
GENERAL, GIVEN = "general", "off_context_dataset"
# Of a data set no more is read: some hold millions, and a share of a set is a few thousand at the most.
_ROWS_READ = 50_000
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def num_off_context(conversations: int, share: float) -> int:
    """How many general conversations beside so many about the text make up a share of all."""
    return round(conversations * share / (1 - share))


def general_request(index: int, seed: int) -> str:
    """A request of this package's own, each once in an order of the seed; empty where there are no more. What small models
    ask for themselves is more of a kind, and often no request at all."""
    if index >= len(GENERAL_REQUESTS):
        return ""
    return random.Random(f"{seed}/{GENERAL}").sample(GENERAL_REQUESTS, len(GENERAL_REQUESTS))[index]


def plan_general(kind: str, rng: random.Random, question: str = "") -> Plan:
    """How a conversation that the model writes begins; with a `question`, that is what it answers first."""
    return Plan(kind, draw_general_prompt(rng), "", rng.getrandbits(62), question, GENERAL_FOLLOW_UPS)


def context_of_teacher(
    row: Mapping[str, Any], codec: ChatCodec, bare_preamble: Sequence[int]
) -> tuple[tuple[int, ...], list[int]]:
    """What the teacher sees of a row: token ids that stand in front, and those behind them.

    Args:
        row: Of a conversation set. Without `context`, its teacher is the model as it is without a cartridge.
        codec: Renders contexts; the student's.
        bare_preamble: What the model's own chat template puts in front of a conversation: behind a cartridge, the
            default system prompt that is there is left out.
    """
    start = row["turns_start"]
    front, turns = list(row["input_ids"][:start]), list(row["input_ids"][start:])
    if row.get("context"):
        return tuple(codec.encode_context(row["context"])), turns
    return tuple(bare_preamble if front == codec.preamble else front), turns


class GivenConversations:
    """Conversations or prompts of the user's, in an order of their own.

    Args:
        rows: Each with `messages`, or `prompt` and (or without) `completion` or `answer`; of a conversation the first
            question and answer count. Prompts without an answer are answered by the model.
        seed: Of the order.

    Raises:
        ValueError: there are no rows, or one has no such columns; the message names the remedy.
    """

    def __init__(self, rows: Any, seed: int) -> None:
        pairs = [_pair(row, number) for number, row in enumerate(itertools.islice(rows, _ROWS_READ))]
        if not pairs:
            raise ValueError("`off_context_dataset` has no rows: give some conversations, or leave it out.")
        self.identity = f"{len(pairs)} rows, sha256 {hashlib.sha256(json.dumps(pairs).encode()).hexdigest()}"
        self._pairs = random.Random(f"{seed}/{GIVEN}").sample(pairs, len(pairs))

    @classmethod
    def load(cls, source: Any, seed: int) -> GivenConversations:
        """Of a `datasets.Dataset` or other rows, a file (JSON lines, Parquet), or a data set's name on the Hub (its
        split `train`).

        Raises:
            ValueError: as the class, or there is no such file.
            HubError: the Hub has no such data set, refuses it, or cannot be reached.
        """
        if not isinstance(source, (str, Path)):
            return cls(source, seed)
        name, path = str(source).removeprefix("hf://datasets/"), Path(source)
        if path.is_file() and path.suffix in _READERS:
            return cls(load_dataset(_READERS[path.suffix], data_files=str(path), split="train"), seed)
        if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise ValueError(
                f"`off_context_dataset` is {str(source)!r}: give a file ({', '.join(_READERS)}), a name on the Hub "
                "(`user/name`) or, in Python, a `datasets.Dataset`."
            )
        with hub_errors(name):
            return cls(load_dataset(name, split="train"), seed)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[str, str]:
        """A question and its answer, which may be empty."""
        return self._pairs[index]


def given_conversation(question: str, answer: str, codec: ChatCodec, args: SynthesisConfig) -> Conversation:
    """A conversation as it was given; a longer answer than `max_answer_tokens` is cut.

    Raises:
        ValueError: the chat template changes the question or the answer.
    """
    prompt_ids, answer_ids = codec.encode_exchange(question, answer)
    cut = answer_ids[: args.max_answer_tokens]
    return Conversation(None, GIVEN, [Turn(question, prompt_ids, cut, answer_ended=len(cut) == len(answer_ids))])


def _pair(row: Mapping[str, Any], number: int) -> tuple[str, str]:
    """The first question of a row, and its answer."""
    given = row.get("messages") or [*_messages(row.get("prompt"), "user"), *_answers(row)]
    turns = [message for message in given if message.get("role") != "system"]
    if not turns or turns[0].get("role") != "user" or not str(turns[0].get("content") or "").strip():
        raise ValueError(
            f"`off_context_dataset[{number}]` has no question (it has {', '.join(sorted(row)) or 'no columns'}): give rows "
            "with `messages` that begin with the user's, or with `prompt` and, where it is known, `completion`."
        )
    answer = turns[1]["content"] if len(turns) > 1 and turns[1].get("role") == "assistant" else ""
    return turns[0]["content"], answer or ""


def _answers(row: Mapping[str, Any]) -> list[dict[str, str]]:
    return _messages(row.get("completion") or row.get("answer"), "assistant")


def _messages(value: Any, role: str) -> list[dict[str, str]]:
    """A text as a message; messages as they are."""
    if not value:
        return []
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)
