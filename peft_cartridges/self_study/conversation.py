"""A conversation about a chunk, and its token ids as they are trained on.

What was generated is what is trained on: an answer's ids are those that the model sampled, never a re-encoding. What
stands between two answers is the chat template's, see `ChatCodec.encode_dialogue`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..chat import ChatCodec
from ..conversations.targets import TopK
from .prompts import FOLLOW_UPS


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Args:
        question: The user's message.
        prompt_ids: Token ids from the end of the answer before (in the first turn, of the context) up to where the
            answer begins.
        answer_ids: Token ids of the answer, with the end-of-turn token if the model ended it.
        question_ended, answer_ended: Whether the model ended them, or they were cut.
        top_k: The teacher's targets for `answer_ids`, where the engine gave them along.
    """

    question: str
    prompt_ids: list[int]
    answer_ids: list[int]
    question_ended: bool = True
    answer_ended: bool = True
    top_k: TopK | None = None


@dataclass(frozen=True)
class Plan:
    """How a conversation begins.

    Args:
        seed_type: Kind of its seed prompt.
        prompt: What the asking side is told.
        reasoning: What each question ends with, if its answer is to be reasoned out.
        seed: Of its random draws.
        question: The first question, where that is given and not asked for.
        follow_ups: What the asking side may be told after an answer.
    """

    seed_type: str
    prompt: str
    reasoning: str
    seed: int
    question: str = ""
    follow_ups: tuple[str, ...] = FOLLOW_UPS


@dataclass(frozen=True)
class Conversation:
    """One or more turns about a chunk.

    Args:
        chunk_id: The chunk in the teacher's context; `None` off context.
        seed_type: What it began with.
        turns: First to last.
    """

    chunk_id: str | None
    seed_type: str
    turns: list[Turn] = field(default_factory=list)

    @property
    def turn_ids(self) -> list[int]:
        """What the teacher sees behind the chunk."""
        return [token for turn in self.turns for token in (*turn.prompt_ids, *turn.answer_ids)]

    @property
    def learned(self) -> list[int]:
        """1 where `turn_ids` is an answer's token, else 0."""
        return [mark for turn in self.turns for mark in [0] * len(turn.prompt_ids) + [1] * len(turn.answer_ids)]

    def messages(self, codec: ChatCodec) -> list[dict[str, str]]:
        return [
            message
            for turn in self.turns
            for message in (
                {"role": "user", "content": turn.question},
                {"role": "assistant", "content": codec.decode(turn.answer_ids)},
            )
        ]

    def to_row(self, codec: ChatCodec, preamble: Sequence[int] | None = None) -> dict[str, Any]:
        """The row of a training data set, without the teacher's targets.

        `input_ids` is what the student sees behind its cartridge: the turns, with `preamble` in front (by default what
        the chat template puts there without a system message). `completion_mask` marks the answers' tokens, the ones
        that are learned. The teacher sees the chunk in context, and `input_ids` from `turns_start` on behind it.
        """
        preamble = codec.preamble if preamble is None else list(preamble)
        return {
            "messages": self.messages(codec),
            "input_ids": preamble + self.turn_ids,
            "completion_mask": [0] * len(preamble) + self.learned,
            "turns_start": len(preamble),
            "chunk_id": self.chunk_id,
            "seed_type": self.seed_type,
        }
