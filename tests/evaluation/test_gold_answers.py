"""Gold-answer likelihood against a plain forward of the whole conversation."""

from __future__ import annotations

from typing import Any

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


MERGING = tiny_tokenizer()  # as in Gemma 3, a system message is the beginning of the first user message
MERGING.chat_template = (
    "{{ bos_token }} {% if messages[0]['role'] == 'system' %}{% set first, rest = messages[0]['content'], messages[1:] %}"
    "{% else %}{% set first, rest = '', messages %}{% endif %}"
    "{% for m in rest %}<{{ m['role'] }}> {{ first if loop.first else '' }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
tokenizers = pytest.mark.parametrize("tokenizer", [TOKENIZER, MERGING], ids=["system message", "merged"])


def _plain(context: str | None, tokenizer: Any) -> float:
    model, total, count = tiny_model(), 0.0, 0
    for pair in PAIRS:
        messages = [{"role": "user", "content": pair["question"]}, {"role": "assistant", "content": pair["answer"]}]
        if context:
            messages.insert(0, {"role": "system", "content": context})
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        answer = tokenizer(pair["answer"])["input_ids"]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position, token in enumerate(answer, start=len(prompt)):
            total -= log_probs[position - 1, token].item()
        count += len(answer)
    return total / count


@tokenizers
def test_without_context(tokenizer: Any) -> None:
    assert gold_answer_nll(tiny_model(), tokenizer, PAIRS) == pytest.approx(_plain(None, tokenizer), abs=1e-4)


@tokenizers
def test_with_the_text_in_context(tokenizer: Any) -> None:
    model = tiny_model()
    with shared_prefix(model, KVPrefix.from_text(model, tokenizer, TEXT)):
        actual = gold_answer_nll(model, tokenizer, PAIRS, in_context=True)
    assert actual == pytest.approx(_plain(TEXT, tokenizer), abs=1e-4)


def test_bad_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="`questions` is empty"):
        gold_answer_nll(tiny_model(), TOKENIZER, [])
    with pytest.raises(ValueError, match=r"`questions\[1\]` needs"):
        gold_answer_nll(tiny_model(), TOKENIZER, [PAIRS[0], {"question": "what ?"}])
