"""A conversation about a chunk, and its token ids as they are trained on.

What was generated is what is trained on: an answer's ids are those that the model sampled, never a re-encoding. What
stands between two answers is the chat template's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..chat import encode_preamble, encode_turns, get_tokenizer, render_turns
from ..conversations.targets import TopK


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
        generated: Tokens that were generated for it, question and answer.
    """

    question: str
    prompt_ids: list[int]
    answer_ids: list[int]
    question_ended: bool = True
    answer_ended: bool = True
    top_k: TopK | None = None
    generated: int = 0


@dataclass(frozen=True)
class Conversation:
    """One or more turns about a chunk.

    Args:
        chunk_id: The chunk in the teacher's context.
        seed_type: What it began with.
        turns: First to last.
        seed: Of its random draws.
    """

    chunk_id: str
    seed_type: str
    turns: list[Turn] = field(default_factory=list)
    seed: int = 0

    @property
    def turn_ids(self) -> list[int]:
        """What the teacher sees behind the chunk."""
        return [token for turn in self.turns for token in (*turn.prompt_ids, *turn.answer_ids)]

    @property
    def learned(self) -> list[int]:
        """1 where `turn_ids` is an answer's token, else 0."""
        return [mark for turn in self.turns for mark in [0] * len(turn.prompt_ids) + [1] * len(turn.answer_ids)]

    def messages(self, processing_class: Any) -> list[dict[str, str]]:
        decode = get_tokenizer(processing_class).decode
        return [
            message
            for turn in self.turns
            for message in (
                {"role": "user", "content": turn.question},
                {"role": "assistant", "content": decode(turn.answer_ids, skip_special_tokens=True)},
            )
        ]

    def to_row(self, processing_class: Any, preamble: Sequence[int] | None = None) -> dict[str, Any]:
        """The row of a training data set, without the teacher's targets.

        `input_ids` is what the student sees behind its cartridge: the turns, with `preamble` in front (by default what
        the chat template puts there without a system message). `completion_mask` marks the answers' tokens, the ones
        that are learned.
        """
        preamble = encode_preamble(processing_class) if preamble is None else list(preamble)
        return {
            "messages": self.messages(processing_class),
            "input_ids": preamble + self.turn_ids,
            "completion_mask": [0] * len(preamble) + self.learned,
            "chunk_id": self.chunk_id,
            "seed_type": self.seed_type,
        }


def encode_question(processing_class: Any, question: str) -> list[int]:
    """Token ids of a user's message behind a context, up to where the answer begins."""
    return encode_turns(processing_class, [{"role": "user", "content": question}], add_generation_prompt=True)


def encode_next_question(processing_class: Any, answer_ids: Sequence[int], question: str) -> list[int]:
    """Token ids of a further question, behind an answer as it was generated, up to where the next answer begins: the
    rest of the answer's turn (all of its end, where the answer was cut), then the user's message."""
    tokenizer, marker = get_tokenizer(processing_class), "[an answer]"
    while marker in question:
        marker = f"[{marker}]"
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": marker},
        {"role": "user", "content": question},
    ]
    rendered = render_turns(tokenizer, messages, add_generation_prompt=True)
    ids = tokenizer(rendered.rpartition(marker)[2], add_special_tokens=False)["input_ids"]
    ends = end_of_turn_ids(tokenizer)
    return ids[1:] if answer_ids and answer_ids[-1] in ends and ids[0] in ends else ids


def encode_answer(processing_class: Any, question: str, answer: str) -> list[int]:
    """Token ids of a given answer with what the chat template puts behind it, up to the end-of-turn token."""
    tokenizer = get_tokenizer(processing_class)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids = encode_turns(tokenizer, messages)[len(encode_question(tokenizer, question)) :]
    ends = end_of_turn_ids(tokenizer)
    while ids and ids[-1] not in ends and any(token in ends for token in ids):
        ids.pop()  # a line break behind the end-of-turn token, which the model never generates
    return ids


def end_of_turn_ids(processing_class: Any, model: Any = None) -> set[int]:
    """Token ids that end an answer: the tokenizer's, and those of the model's generation configuration."""
    ends = {get_tokenizer(processing_class).eos_token_id}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends.update(configured if isinstance(configured, list) else [configured])
    return {token for token in ends if token is not None}
