"""How likely a model finds gold answers, with no context, a cartridge, or the full text in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..chat import ChatCodec
from ..hidden_states import OutputHead, predicting_states


@torch.no_grad()
def gold_answer_nll(
    model: nn.Module,
    processing_class: Any,
    questions: Sequence[dict[str, str]],
    *,
    in_context: bool = False,
    batch_size: int = 16,
) -> float:
    """Mean negative log-likelihood per token, in nats, of gold answers (the end-of-turn token left out).

    Args:
        model: A causal LM, with whatever prefix or cartridge is active on it.
        processing_class: Its tokenizer or processor, with a chat template, or a `ChatCodec` with it.
        questions: Pairs with `question` and `answer`.
        in_context: Whether a context stands in front already (a document by `shared_prefix`); otherwise the question is
            rendered as the chat template does without one.
        batch_size: Pairs scored together.

    Raises:
        ValueError: there are no pairs, or one without a question or an answer.
    """
    if not questions:
        raise ValueError("`questions` is empty: give at least one pair with `question` and `answer`.")
    codec = ChatCodec.of(model, processing_class)
    preamble = [] if in_context else codec.preamble
    rows, lengths = [], []
    check_questions(questions)
    for pair in questions:
        prompt, answer = codec.encode_exchange(pair["question"], pair["answer"])
        answer = codec.without_end(answer)
        rows.append(preamble + prompt + answer)
        lengths.append(len(answer))
    training = model.training
    model.eval()
    states = predicting_states(model, rows, lengths, batch_size=batch_size)
    model.train(training)
    head, total = OutputHead(model), 0.0
    for row, length, hidden in zip(rows, lengths, states, strict=True):
        log_probs = head(hidden).float().log_softmax(-1)
        total -= log_probs.gather(-1, torch.tensor(row[-length:], device=log_probs.device)[:, None]).sum().item()
    return total / sum(lengths)


def check_questions(questions: Sequence[dict[str, str]], name: str = "questions") -> None:
    """Raises:
    ValueError: a pair has no `question` or no `answer`.
    """
    for number, pair in enumerate(questions):
        if not pair.get("question") or not pair.get("answer"):
            raise ValueError(f"`{name}[{number}]` needs a `question` and an `answer`, it has {sorted(pair)}.")
