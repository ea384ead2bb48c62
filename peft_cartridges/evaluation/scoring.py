"""How likely a system finds given answers, and what it would have said at each of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..chat import ChatCodec
from ..hidden_states import OutputHead, predicting_states
from ..kv_prefix import evaluating
from .system import System


@dataclass(frozen=True)
class Row:
    """Turns behind a context, of which the last tokens are looked at.

    Args:
        prompt: The question that they begin with, by which retrieval chooses.
        ids: Token ids of the turns.
        length: How many of the last ones are looked at.
    """

    prompt: str
    ids: list[int]
    length: int

    @property
    def answer_ids(self) -> list[int]:
        return self.ids[-self.length :]


def row_of_answer(codec: ChatCodec, question: str, answer: str) -> Row:
    """Question and answer as the chat template writes them, without the end-of-turn token.

    Raises:
        ValueError: question or answer is empty.
    """
    if not question or not answer:
        raise ValueError("a pair needs a `question` and an `answer`.")
    exchange = codec.encode_exchange(question, answer)
    ids = codec.without_end(exchange.answer_ids)
    return Row(question, exchange.prompt_ids + ids, len(ids))


def row_of_ids(codec: ChatCodec, question: str, answer_ids: Sequence[int]) -> Row:
    """A question with an answer as it was generated."""
    exchange = codec.encode_dialogue([question], [answer_ids])[0]
    return Row(question, [*exchange.prompt_ids, *answer_ids], len(answer_ids))


def row_of_conversation(conversation: Mapping[str, Any], preamble: Sequence[int]) -> Row:
    """A row of a self-study data set (`input_ids`, `completion_mask`, `messages`), of which the tokens from the first
    learned one to the last are looked at. Its turns begin at `turns_start` where the row has that column, else behind
    `preamble`, where it begins with that.

    Raises:
        ValueError: no token is learned.
    """
    ids, mask = list(conversation["input_ids"]), list(conversation["completion_mask"])
    start = conversation.get("turns_start")
    if start is None:
        start = len(preamble) if ids[: len(preamble)] == list(preamble) else 0
    ids, mask = ids[start:], mask[start:]
    if 1 not in mask:
        raise ValueError("a conversation has no learned token (`completion_mask` is 0 all over).")
    first, last = mask.index(1), len(mask) - mask[::-1].index(1)
    return Row(conversation["messages"][0]["content"], ids[:last], last - first)


@dataclass(frozen=True)
class Score:
    """Of one row: the sum of its tokens' negative log-likelihoods in nats, and how many they are."""

    nll: float
    tokens: int


@torch.no_grad()
def predictions(system: System, rows: Sequence[Row], *, batch_size: int = 16) -> list[Tensor]:
    """Final hidden states `[row.length, hidden_size]` that predict each row's last tokens."""
    if system.engine is not None:
        device = next(system.model.parameters()).device
        found = system.engine.states([system.preamble + row.ids for row in rows], [row.length for row in rows])
        return [hidden.to(device) for hidden in found]
    states: list[Tensor] = [torch.empty(0)] * len(rows)
    for indices, context in system.parts([row.prompt for row in rows]):
        with context as model, evaluating(model):
            found = predicting_states(
                model,
                [system.preamble + rows[i].ids for i in indices],
                [rows[i].length for i in indices],
                batch_size=batch_size,
            )
        for index, hidden in zip(indices, found, strict=True):
            states[index] = hidden
    return states


@torch.no_grad()
def score_rows(system: System, rows: Sequence[Row], *, batch_size: int = 16) -> list[Score]:
    """The likelihood of each row's last tokens."""
    return [
        _score(log_probs, row)
        for log_probs, row in zip(_log_probs(system, rows, batch_size=batch_size), rows, strict=True)
    ]


@dataclass(frozen=True)
class Divergence:
    """Of one row, over its tokens: the sum of KL(reference ‖ system) in nats, tokens on whose likeliest next token both
    agree, the sum of the system's negative log-likelihoods in nats, and how many tokens there are."""

    kl: float
    agreed: int
    nll: float
    tokens: int


@torch.no_grad()
def compare_rows(
    system: System, rows: Sequence[Row], reference: Sequence[Tensor], *, batch_size: int = 16
) -> list[Divergence]:
    """How far a system is from a reference on the same tokens, over the whole vocabulary.

    Args:
        system: The one that is measured.
        rows: What both read.
        reference: `predictions` of the other, by the same base model (its output head turns both into distributions).
    """
    results = []
    head = OutputHead(system.model)
    for row, ours, states in zip(rows, _log_probs(system, rows, batch_size=batch_size), reference, strict=True):
        other = head(states).float().log_softmax(-1)
        kl = (other.exp() * (other - ours)).sum().item()
        agreed = int((ours.argmax(-1) == other.argmax(-1)).sum())
        results.append(Divergence(kl, agreed, _score(ours, row).nll, row.length))
    return results


def _log_probs(system: System, rows: Sequence[Row], *, batch_size: int) -> Iterator[Tensor]:
    """`[row.length, vocab_size]` of one row after the other, so that there never are logits of all."""
    head = OutputHead(system.model)
    for hidden in predictions(system, rows, batch_size=batch_size):
        yield head(hidden).float().log_softmax(-1)


def _score(log_probs: Tensor, row: Row) -> Score:
    ids = torch.tensor(row.answer_ids, device=log_probs.device)
    return Score(-log_probs.gather(-1, ids[:, None]).sum().item(), row.length)
