"""The gate: its scores against a plain reference, what it lets through, and its file."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from peft_cartridges import Gate, KVPrefix
from peft_cartridges.gate import GATE_FILE, GENERAL_REQUESTS, TEXT_QUESTIONS, any_accepts, load_gate
from peft_cartridges.gate.gate import split_words
from tests.exactness import cartridge_model
from tests.tiny_models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = "The keeper of the lighthouse counts ships. Ships pass the lighthouse at night; the keeper, Ingrid, counts them."
ABOUT = ["Who counts the ships?", "Does Ingrid keep the lighthouse at night?", "How many ships pass the keeper?"]


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate.make(TEXT, TOKENIZER)


def _reference(request: str) -> float:
    """By the formula of the docstring, word by word."""
    said, asked = (Counter(w[:4] for t in texts for w in split_words(t)) for texts in ([TEXT], TEXT_QUESTIONS))
    ids: dict[str, list[int]] = {}
    for word in {word for text in (TEXT, *TEXT_QUESTIONS) for word in split_words(text)}:
        for form in (word, f" {word}", f" {word.capitalize()}"):
            found = TOKENIZER(form, add_special_tokens=False)["input_ids"]
            ids.setdefault(word[:4], []).append(
                found[0] if len(found) == 1 and found[0] != TOKENIZER.unk_token_id else len(TOKENIZER)
            )
    ratios = []
    for word in (w[:4] for w in split_words(request)):
        common = 1 / (math.log(len(TOKENIZER)) * (min(ids.get(word, [len(TOKENIZER)])) + 50))
        share = 0.7 * said[word] / said.total() + 0.2 * asked[word] / asked.total()
        ratios.append(math.log(share / common + 0.1))
    return sum(ratios) / len(ratios)


@pytest.mark.parametrize("request_", [*ABOUT, "Write a poem about love.", "zebra", *GENERAL_REQUESTS[:5]])
def test_the_score_is_the_mean_log_ratio(gate: Gate, request_: str) -> None:
    assert gate.score(request_) == pytest.approx(_reference(request_), abs=1e-6)


def test_questions_on_the_text_are_let_through_and_others_are_not(gate: Gate) -> None:
    assert gate(ABOUT) == [True] * 3
    assert gate(["Write a haiku in Spanish.", "What is 3 times 4?", "¿?", ""]) == [False] * 4
    assert gate("Who counts the ships?") == [True]  # one request, as a batch of one
    assert gate.adapter_names([ABOUT[0], "Translate good morning."], "a") == ["a", "__base__"]
    # What speaks of "the text" means nothing without it, whatever the text's own words are.
    assert gate.score("Summarize the document.") > gate.score("Summarize the weather.")


def test_the_threshold_is_set_by_the_general_requests(gate: Gate) -> None:
    scores = [gate.score(request) for request in GENERAL_REQUESTS]
    assert gate.num_general == len(scores)
    assert gate.general_rejected == sum(score < gate.threshold for score in scores) / len(scores)
    assert 0.85 <= gate.general_rejected < 0.87
    strict = Gate.make(TEXT, TOKENIZER, reject_general=0.99)
    assert strict.threshold > gate.threshold and torch.equal(strict.weights, gate.weights)
    other = Gate.make(TEXT, TOKENIZER, general=["ships ships ships", "Who counts ships?"], reject_general=0.5)
    assert other.threshold == max(other.score("ships ships ships"), other.score("Who counts ships?"))


def test_parts_are_one_text_and_repeated_parts_count_once(gate: Gate) -> None:
    first, second = TEXT.split(";")
    halves = Gate.make([first, second, first], TOKENIZER)
    assert torch.equal(halves.words, gate.words) and torch.allclose(halves.weights, gate.weights)


def test_a_conversation_is_judged_by_its_last_message_and_a_follow_up_with_the_one_before(gate: Gate) -> None:
    def said(*texts: Any) -> list[dict[str, Any]]:
        roles = ("user", "assistant")
        return [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]

    general = "Write a long poem about love and rain."
    assert gate.score(said(ABOUT[0], "She does.", general)) == gate.score(general)
    assert gate.score(said(general, "The ships, the keeper, Ingrid.", "And why?")) == gate.score(f"{general} And why?")
    assert gate.accepts(said(ABOUT[1], "Yes.", "Since when?")) and not gate.accepts(said("Since when?"))
    parts = [{"type": "text", "text": ABOUT[0]}, {"type": "image"}]
    assert gate.score(said(parts)) == gate.score(ABOUT[0])
    assert gate([said(ABOUT[0]), said(general)]) == [True, False] and gate(said(ABOUT[0])) == [True]
    assert gate.score([{"role": "system", "content": TEXT}]) == gate.absent


def test_scripts_without_spaces_have_their_characters() -> None:
    gate = Gate.make("灯台の番人は船を数える。夜の船。", TOKENIZER)
    assert split_words("夜の船") == ["夜", "の", "船"]
    assert gate.score("番人は夜の船を数える") > gate.score("詩を書いてください")


def test_it_comes_back_from_its_file(gate: Gate, tmp_path: Path) -> None:
    assert load_gate(tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"has no gate .*make one with `cartridges gate`"):
        Gate.from_pretrained(tmp_path)
    path = gate.save_pretrained(tmp_path)
    assert path.name == GATE_FILE and path.stat().st_size < 12 * len(gate.words) + 1024
    assert sorted(file.name for file in tmp_path.iterdir()) == [GATE_FILE]
    back = Gate.from_pretrained(tmp_path)
    assert (back.threshold, back.absent, back.num_general) == (gate.threshold, gate.absent, gate.num_general)
    assert torch.equal(back.words, gate.words) and back(ABOUT) == gate(ABOUT)
    assert b"lighthouse" not in path.read_bytes() and b"ligh" not in path.read_bytes()


def _write(path: Path, **changes: Any) -> None:
    fields = {"absent": -1.2, "threshold": 1.0, "general_rejected": 0.9, "num_general": 3}
    tensors = {"words": torch.tensor([1, 2]), "weights": torch.tensor([0.5, 0.25])}
    tensors |= changes.pop("tensors", {})
    metadata = {"format": "1", "gate": json.dumps({**fields, **changes.pop("fields", {})})} | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata=metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "2"}, "format '2', this version reads '1'"),
        ({"gate": "{}"}, "damaged .'absent'"),
        ({"gate": "no JSON"}, "damaged"),
        ({"fields": {"threshold": "1"}}, "damaged"),
        ({"fields": {"threshold": math.nan}}, "not finite"),
        ({"tensors": {"weights": torch.tensor([0.5, math.inf])}}, "not finite"),
        ({"tensors": {"weights": torch.tensor([0.5])}}, "do not go together"),
        ({"tensors": {"words": torch.tensor([1.0, 2.0])}}, "do not go together"),
        ({"tensors": {"words": None}}, "expected words and weights"),
        ({"tensors": {"more": torch.tensor([1])}}, "expected words and weights"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    _write(tmp_path / GATE_FILE)
    assert load_gate(tmp_path) is not None
    _write(tmp_path / GATE_FILE, **changes)
    with pytest.raises(ValueError, match=message):
        load_gate(tmp_path)


def test_a_file_that_is_cut_or_too_large_is_refused(gate: Gate, tmp_path: Path) -> None:
    path = gate.save_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        load_gate(tmp_path)
    with path.open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(ValueError, match="larger than"):
        load_gate(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": " … "}, "no word"),
        ({"text": []}, "no word"),
        ({"general": []}, "`general` is empty"),
        ({"reject_general": 1.0}, "`reject_general` is 1.0"),
    ],
)
def test_what_no_gate_can_be_made_of(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gate.make(arguments.pop("text", TEXT), TOKENIZER, **arguments)


def test_a_composition_takes_what_any_of_its_parts_takes(gate: Gate) -> None:
    other = Gate.make("Paolo bakes bread in the bakery of Mill Lane, and sells bread.", TOKENIZER)
    asked = [ABOUT[0], "Who bakes bread in the bakery?", "Write a haiku in Spanish."]
    assert [any_accepts([gate, other], one) for one in asked] == [True, True, False]
    assert [any_accepts([gate], one) for one in asked] == [True, False, False]
    assert any_accepts([gate, None], asked[2]) and any_accepts([], asked[2])  # without a gate, all is taken


def test_rows_of_a_batch_go_with_or_without_the_cartridge(gate: Gate) -> None:
    """Each row's logits are those of the model behind the cartridge, or of the bare model."""
    model = tiny_model()
    peft_model = cartridge_model(model, KVPrefix.from_text(model, TOKENIZER, "the old captain says yes ."))
    requests = [ABOUT[0], "Write a haiku in Spanish."]
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    peft_model.eval()
    with torch.no_grad():
        mixed = peft_model(input_ids=ids, adapter_names=gate.adapter_names(requests)).logits
        behind = peft_model(input_ids=ids[:1]).logits[0]
        with peft_model.disable_adapter():
            bare = peft_model(input_ids=ids[:1]).logits[0]
    assert torch.allclose(mixed[0], behind, atol=1e-5) and torch.allclose(mixed[1], bare, atol=1e-5)
    assert not torch.allclose(behind, bare, atol=1e-2)
