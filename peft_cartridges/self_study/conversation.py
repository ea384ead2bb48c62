"""A conversation about a chunk, and its token ids as they are trained on.

What was generated is what is trained on: an answer's ids are those that the model sampled, never a re-encoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..chat import encode_preamble, encode_turns, get_tokenizer


@dataclass(frozen=True)
class Conversation:
    """One question and its answer.

    Args:
        chunk_id: The chunk in the teacher's context.
        seed_type: What it began with.
        question: The user's message.
        prompt_ids: Token ids of the turns up to where the answer begins, as they stand behind a context.
        answer_ids: Token ids of the answer, with the end-of-turn token if the model ended it.
    """

    chunk_id: str
    seed_type: str
    question: str
    prompt_ids: list[int]
    answer_ids: list[int]

    @property
    def turn_ids(self) -> list[int]:
        """What the teacher sees behind the chunk."""
        return self.prompt_ids + self.answer_ids

    def to_row(self, processing_class: Any) -> dict[str, Any]:
        """The row of a training data set, without the teacher's targets.

        `input_ids` is what the student sees behind its cartridge: the turns, with what the chat template puts in front
        when there is no system message. `completion_mask` marks the answer's tokens, the ones that are learned.
        """
        preamble = encode_preamble(processing_class)
        answer = get_tokenizer(processing_class).decode(self.answer_ids, skip_special_tokens=True)
        return {
            "messages": [{"role": "user", "content": self.question}, {"role": "assistant", "content": answer}],
            "input_ids": preamble + self.turn_ids,
            "completion_mask": [0] * (len(preamble) + len(self.prompt_ids)) + [1] * len(self.answer_ids),
            "chunk_id": self.chunk_id,
            "seed_type": self.seed_type,
        }


def encode_question(processing_class: Any, question: str) -> list[int]:
    """Token ids of a user's message behind a context, up to where the answer begins."""
    return encode_turns(processing_class, [{"role": "user", "content": question}], add_generation_prompt=True)


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
