"""Gold-answer likelihood against a plain forward of the whole conversation."""

from __future__ import annotations

import pytest
import torch

from peft_cartridges import KVPrefix, gold_answer_nll, shared_prefix
from tests.tiny_models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PAIRS = [
    {"question": "what is the sea ?", "answer": "the sea is blue ."},
    {"question": "who tells the captain ?", "answer": "the old keeper of the harbor light tells the captain ."},
]
TEXT = "the old captain says yes . the new ship is red ."


def _plain(context: str | None) -> float:
    model, total, count = tiny_model(), 0.0, 0
    for pair in PAIRS:
        messages = [{"role": "user", "content": pair["question"]}, {"role": "assistant", "content": pair["answer"]}]
        if context:
            messages.insert(0, {"role": "system", "content": context})
        ids = TOKENIZER.apply_chat_template(messages, tokenize=True, return_dict=False)
        prompt = TOKENIZER.apply_chat_template(
            messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        answer = TOKENIZER(pair["answer"])["input_ids"]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position, token in enumerate(answer, start=len(prompt)):
            total -= log_probs[position - 1, token].item()
        count += len(answer)
    return total / count


def test_without_context() -> None:
    assert gold_answer_nll(tiny_model(), TOKENIZER, PAIRS) == pytest.approx(_plain(None), abs=1e-4)


def test_with_the_text_in_context() -> None:
    model = tiny_model()
    with shared_prefix(model, KVPrefix.from_text(model, TOKENIZER, TEXT)):
        actual = gold_answer_nll(model, TOKENIZER, PAIRS, in_context=True)
    assert actual == pytest.approx(_plain(TEXT), abs=1e-4)


def test_bad_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="`questions` is empty"):
        gold_answer_nll(tiny_model(), TOKENIZER, [])
    with pytest.raises(ValueError, match=r"`questions\[1\]` needs"):
        gold_answer_nll(tiny_model(), TOKENIZER, [PAIRS[0], {"question": "what ?"}])
