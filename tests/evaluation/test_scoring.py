"""Likelihoods, divergences and multiple choice against plain forwards of whole conversations."""

from __future__ import annotations

import pytest
import torch

from peft_cartridges import KVPrefix, gold_answer_nll, shared_prefix
from peft_cartridges.chat import ChatCodec
from peft_cartridges.evaluation.documents import Question
from peft_cartridges.evaluation.multiple_choice import choose_options
from peft_cartridges.evaluation.scoring import (
    Row,
    compare_rows,
    predictions,
    row_of_answer,
    row_of_conversation,
    row_of_ids,
    score_rows,
)
from peft_cartridges.evaluation.system import System, bare_system, cartridge_system, prefix_system
from tests.exactness import cartridge_model, past_key_values_logits
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXT = "the old captain says yes . the new ship is red ."
QUESTION, ANSWER = "what is the sea ?", "the sea is blue ."
CODEC = ChatCodec(None, tiny_tokenizer())


def _systems() -> tuple[torch.nn.Module, KVPrefix, System, System]:
    model = tiny_model()
    prefix = KVPrefix.from_text(model, CODEC, TEXT)
    return model, prefix, bare_system(model, CODEC), prefix_system("text", model, CODEC, prefix)


def _log_probs(model: torch.nn.Module, prefix: KVPrefix | None, row: Row) -> torch.Tensor:
    return past_key_values_logits(model, prefix, torch.tensor(row.ids))[-row.length - 1 : -1].log_softmax(-1)


def test_likelihood_is_that_of_a_plain_forward() -> None:
    model, prefix, bare, text = _systems()
    row = row_of_answer(CODEC, QUESTION, ANSWER)
    assert row.answer_ids == CODEC.tokenizer(ANSWER)["input_ids"]
    for system, context in ((bare, None), (text, prefix)):
        (score,) = score_rows(system, [row])
        plain = _log_probs(model, context, row)
        expected = -sum(plain[i, token].item() for i, token in enumerate(row.answer_ids))
        assert score.nll == pytest.approx(expected, abs=1e-4) and score.tokens == 5
    with shared_prefix(model, prefix):
        mean = gold_answer_nll(model, CODEC, [{"question": QUESTION, "answer": ANSWER}], in_context=True)
    assert mean == pytest.approx(expected / 5, abs=1e-5)


def test_divergence_and_agreement_by_hand() -> None:
    model, prefix, bare, text = _systems()
    rows = [row_of_answer(CODEC, QUESTION, ANSWER), row_of_answer(CODEC, "who ?", "the keeper .")]
    for found, row in zip(compare_rows(bare, rows, predictions(text, rows)), rows, strict=True):
        teacher, student = _log_probs(model, prefix, row), _log_probs(model, None, row)
        kl = sum((t.exp() * (t - s)).sum().item() for t, s in zip(teacher, student, strict=True))
        agreed = sum(int(t.argmax() == s.argmax()) for t, s in zip(teacher, student, strict=True))
        assert found.kl == pytest.approx(kl, abs=1e-4) and (found.agreed, found.tokens) == (agreed, row.length)
        assert found.nll == pytest.approx(score_rows(bare, [row])[0].nll, abs=1e-4)
        assert kl > 0.01
    same = compare_rows(text, rows, predictions(text, rows))
    assert [(abs(d.kl) < 1e-5, d.agreed) for d in same] == [(True, row.length) for row in rows]


def test_a_cartridge_is_read_as_its_users_call_it() -> None:
    model, prefix, _, text = _systems()
    rows = [row_of_answer(CODEC, QUESTION, ANSWER)]
    expected = score_rows(text, rows)[0].nll
    system = cartridge_system(cartridge_model(model, prefix), CODEC)
    assert system.num_tokens == prefix.num_tokens and system.kv_bytes == prefix.nbytes
    assert score_rows(system, rows)[0].nll == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="without a cartridge"):
        cartridge_system(tiny_model(), CODEC)  # type: ignore[arg-type]


def test_multiple_choice_takes_the_likeliest_option_per_token() -> None:
    model, prefix, _, text = _systems()
    options = ("yes .", "the old captain says yes .", "no .", "blue")
    question = Question("who ?", (options[0],), options, 0)
    means = []
    for option in options:
        row = row_of_answer(CODEC, "who ?", option)
        plain = _log_probs(model, prefix, row)
        means.append(-sum(plain[i, token].item() for i, token in enumerate(row.answer_ids)) / row.length)
    assert choose_options(text, [question, question]) == [means.index(min(means))] * 2
    with pytest.raises(ValueError, match="has no `options`"):
        choose_options(text, [Question("who ?", ("yes",))])


def test_rows_of_conversations_are_the_turns_up_to_the_last_learned_token() -> None:
    row = row_of_ids(CODEC, QUESTION, [30, 31])
    assert row.ids[-2:] == [30, 31] and row.length == 2
    conversation = {
        "input_ids": [1, 1, *row.ids, 9], "completion_mask": [0, 0] + [0] * (len(row.ids) - 2) + [1, 1, 0],
        "messages": [{"role": "user", "content": QUESTION}],
    }  # fmt: skip
    assert row_of_conversation(conversation, [1, 1]) == row
    assert row_of_conversation({**conversation, "turns_start": 2}, []) == row
    assert row_of_conversation({**conversation, "turns_start": 0}, [1, 1]).ids == [1, 1, *row.ids]
    with pytest.raises(ValueError, match="no learned token"):
        row_of_conversation({**conversation, "completion_mask": [0] * 20}, [1, 1])
