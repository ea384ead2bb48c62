"""Cartridges that start from a text."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_cartridges import CartridgeConfig, KVPrefix, initialize_cartridge
from peft_cartridges.chat import ChatCodec
from peft_cartridges.initialization import list_strategies, register_strategy
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXT = " ".join(f"the captain says w{number} ." for number in range(50, 80))


def _model(num_tokens: int = 12) -> PeftModel:
    return get_peft_model(tiny_model(), CartridgeConfig(num_tokens=num_tokens))


def test_first_tokens_are_the_beginning_of_the_text_in_context() -> None:
    model, tokenizer = _model(), tiny_tokenizer()
    prefix = initialize_cartridge(model, tokenizer, text=TEXT, strategy="first_tokens")
    expected = KVPrefix.from_input_ids(tiny_model(), ChatCodec(None, tokenizer).encode_context(TEXT))[:12]
    held = model.get_kv_prefix()
    for name in ("keys", "values"):
        for made, have, want in zip(*(getattr(p, name) for p in (prefix, held, expected)), strict=True):
            torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-5)
            assert torch.equal(made, have)


def test_an_active_cartridge_takes_no_part_in_its_own_initialization() -> None:
    model, tokenizer = _model(), tiny_tokenizer()
    first = initialize_cartridge(model, tokenizer, text=TEXT)
    second = initialize_cartridge(model, tokenizer, text=TEXT)
    assert all(torch.equal(a, b) for a, b in zip(first.keys + first.values, second.keys + second.values, strict=True))


def test_a_prefix_is_taken_as_it_is() -> None:
    model = _model()
    prefix = KVPrefix.from_input_ids(tiny_model(), range(10, 22))
    initialize_cartridge(model, prefix=prefix)
    assert all(torch.equal(a, b) for a, b in zip(model.get_kv_prefix().keys, prefix.keys, strict=True))


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("llama", "attention_matching"),
        ("deepseek_v3", "most_attended"),  # values of all heads in one: nothing to fit
        ("gpt2", "first_tokens"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initialization from the first tokens")
def test_auto_takes_the_best_that_the_model_allows(architecture: str, expected: str) -> None:
    made = []
    for options in ({"strategy": "auto"}, {"strategy": expected}):
        model = get_peft_model(tiny_model(architecture), CartridgeConfig(num_tokens=12))
        made.append(initialize_cartridge(model, tiny_tokenizer(), text=TEXT, **options))
    assert all(torch.equal(a, b) for a, b in zip(made[0].values, made[1].values, strict=True))


def test_a_strategy_of_ones_own() -> None:
    if "last_tokens" not in list_strategies():
        register_strategy(
            "last_tokens",
            lambda model, processing_class, text, *, num_tokens, chat_template: KVPrefix.from_text(
                model, processing_class, text
            )[-num_tokens:],
        )
    model, tokenizer = _model(), tiny_tokenizer()
    prefix = initialize_cartridge(model, tokenizer, text=TEXT, strategy="last_tokens")
    whole = KVPrefix.from_text(tiny_model(), tokenizer, TEXT)
    torch.testing.assert_close(prefix.keys[0], whole.keys[0][:, -12:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="already"):
        register_strategy("last_tokens", lambda *args, **kwargs: whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": ""}, "`text` is empty"),
        ({"text": "the sea"}, "fewer than `num_tokens=12`.*Lower `num_tokens`"),
        ({}, "Give one of `text`"),
        ({"text": TEXT, "strategy": "magic"}, "`strategy='magic'` is unknown; there are: .*first_tokens"),
        ({"text": TEXT, "adapter_name": "b"}, "`adapter_name='b'` is not loaded; there are: default"),
    ],
)
def test_bad_input_names_the_argument(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        initialize_cartridge(_model(), tiny_tokenizer(), **options)


def test_what_is_no_cartridge_model_is_refused() -> None:
    with pytest.raises(ValueError, match="without a cartridge: make one with"):
        initialize_cartridge(tiny_model(), tiny_tokenizer(), text=TEXT)
