"""Metrics of generated answers, each against a case computed by hand, and generation against plain transformers."""

from __future__ import annotations

import sys

import pytest
import torch

from peft_cartridges import KVPrefix
from peft_cartridges.chat import ChatCodec
from peft_cartridges.evaluation.answers import chrf, exact_match, generate_answers, normalize, rouge_l, token_f1
from peft_cartridges.evaluation.system import bare_system, prefix_system
from tests.exactness import past_key_values_generate
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXT = "the old captain says yes . the new ship is red ."


def test_exact_match_looks_past_articles_case_and_punctuation() -> None:
    assert normalize("The  Old, red ship!") == "old red ship"
    assert exact_match("A ship.", ["the boat", "Ship"]) == 1.0
    assert exact_match("A ships.", ["the boat", "Ship"]) == 0.0


def test_token_f1() -> None:
    # "red ship sails" against "red old ship": 2 shared words, 3 and 3 words: 2 * 2 / 6.
    assert token_f1("the red ship sails", ["a red old ship"]) == pytest.approx(2 / 3)
    # The nearest gold answer counts, and a word counts as often as both have it: "no no" and "no" share one.
    assert token_f1("no no", ["yes", "no"]) == pytest.approx(2 / 3)
    assert token_f1("", ["yes"]) == 0.0


def test_rouge_l() -> None:
    pytest.importorskip("rouge_score")
    # The longest common subsequence of "red ship sails" and "red old ship" has 2 of 3 words each.
    assert rouge_l("red ship sails", ["red old ship"]) == pytest.approx(2 / 3)
    assert rouge_l("ship red", ["red ship", "nothing"]) == pytest.approx(0.5)  # in another order: 1 of 2


def test_chrf_is_sacrebleu_s() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    assert chrf("red ship", ["red ship"]) == pytest.approx(1.0)
    assert chrf("zzz", ["red ship"]) == 0.0
    direct = sacrebleu.CHRF().sentence_score("red old ship", ["red ship"]).score / 100
    assert chrf("red old ship", ["red ship"]) == pytest.approx(direct) and 0 < direct < 1


@pytest.mark.parametrize(("metric", "module"), [(rouge_l, "rouge_score.rouge_scorer"), (chrf, "sacrebleu")])
def test_a_missing_extra_is_one_clear_line(metric: object, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'peft-cartridges\[eval\]'") as raised:
        metric("a", ["a"])  # type: ignore[operator]
    assert "\n" not in str(raised.value)


def test_generation_is_that_of_transformers_behind_the_prefix() -> None:
    model, codec = tiny_model(), ChatCodec(None, tiny_tokenizer())
    questions = ["what is the sea ?", "who tells the old captain ?"]
    prefix = KVPrefix.from_text(model, codec, TEXT)
    answers = generate_answers(prefix_system("text", model, codec, prefix), questions, max_new_tokens=6)
    ends = sorted(ChatCodec(model, codec.tokenizer).end_ids)
    for question, answer in zip(questions, answers, strict=True):
        row = torch.tensor([codec.encode_prompt([question])])
        plain = past_key_values_generate(
            model, prefix, row, max_new_tokens=6, do_sample=False, eos_token_id=ends, pad_token_id=0
        )
        expected = plain.sequences[0, row.shape[1] :].tolist()
        cut = next((i for i, token in enumerate(expected) if token in ends), len(expected))
        assert answer == expected[:cut]
    assert generate_answers(bare_system(model, codec), questions, max_new_tokens=6) != answers
