"""`CartridgeConfig` and `get_peft_model`: what is refused, by name and with the remedy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model

from peft_cartridges import CartridgeConfig, KVPrefix, UnsupportedModelError
from tests.tiny_models import tiny_model, token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"`num_tokens` is missing.*CartridgeConfig\(num_tokens=512\)"),
        ({"num_tokens": -3}, "`num_tokens` must be a whole number of at least 0, got -3"),
        ({"num_tokens": 2.5}, "`num_tokens` must be a whole number of at least 0, got 2.5"),
        ({"num_tokens": True}, "`num_tokens` must be a whole number"),
        ({"num_virtual_tokens": -1}, "`num_virtual_tokens` must be a whole number"),
        ({"num_tokens": 4, "num_virtual_tokens": 5}, "`num_tokens=4` and `num_virtual_tokens=5` disagree"),
        ({"num_tokens": 4, "num_frozen_tokens": 5}, r"`num_frozen_tokens` must be between 0 and `num_tokens` \(4\)"),
        ({"num_tokens": 4, "num_frozen_tokens": -1}, "`num_frozen_tokens` must be between 0"),
        ({"num_tokens": 4, "attention": "fast"}, "`attention` must be one of auto, merged, concatenated, got 'fast'"),
        ({"num_tokens": 0, "num_frozen_tokens": 2}, "`num_frozen_tokens` must be between 0"),
        ({"num_tokens": 4, "sliding_window": "none"}, "`sliding_window` must be one of windowed, pinned, got 'none'"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CartridgeConfig(**options)


def test_only_num_tokens_is_needed() -> None:
    config = CartridgeConfig(num_tokens=4)
    assert (config.task_type, config.num_frozen_tokens, config.num_virtual_tokens) == ("CAUSAL_LM", 1, 4)
    model = get_peft_model(tiny_model("llama"), config)
    assert (config.token_dim, config.num_layers, config.num_attention_heads) == (16, 2, 2)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 2 * 2 * 16 * 3
    assert not config.is_prompt_learning


def test_both_names_of_the_length_change_together() -> None:
    for config in (CartridgeConfig(num_tokens=8), CartridgeConfig(num_virtual_tokens=8)):
        for options in ({"num_tokens": 16}, {"num_virtual_tokens": 16}, {"num_tokens": 16, "num_virtual_tokens": 16}):
            longer = replace(replace(config, **options), num_frozen_tokens=2)
            assert (longer.num_tokens, longer.num_virtual_tokens) == (16, 16)
            assert longer == CartridgeConfig(num_tokens=16, num_frozen_tokens=2)
            assert replace(longer, num_virtual_tokens=4).num_tokens == 4
        with pytest.raises(ValueError, match="`num_tokens=5` and `num_virtual_tokens=6` disagree"):
            replace(config, num_tokens=5, num_virtual_tokens=6)
        assert not {"num_tokens", "_length"} & set(config.to_dict())


def test_the_configuration_can_be_used_twice() -> None:
    config = CartridgeConfig(num_tokens=4)
    first, second = get_peft_model(tiny_model("llama"), config), get_peft_model(tiny_model("llama"), config)
    ids = token_ids(1, 4)
    assert first(input_ids=ids).logits.shape == second(input_ids=ids).logits.shape


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_an_encoder_decoder_is_refused(name: str) -> None:
    sizes = {"T5": {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2},
             "Bart": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
                      "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}}[name]  # fmt: skip
    config = getattr(transformers, f"{name}Config")(vocab_size=32, **sizes)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    with pytest.raises(UnsupportedModelError, match=r"`model` is an encoder–decoder.*Use a causal LM"):
        get_peft_model(model, CartridgeConfig(num_tokens=4))


def test_an_encoder_is_refused() -> None:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM takes no `past_key_values`"):
        get_peft_model(transformers.BertForMaskedLM(config), CartridgeConfig(num_tokens=4))


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"`model` is a Linear.*pass a transformers causal LM"):
        get_peft_model(torch.nn.Linear(2, 2), CartridgeConfig(num_tokens=4))


def test_a_prefix_that_does_not_fit_is_refused() -> None:
    model = get_peft_model(tiny_model("llama"), CartridgeConfig(num_tokens=4))
    prefix = KVPrefix.from_input_ids(tiny_model("llama"), token_ids(5))
    with pytest.raises(ValueError, match="`prefix` has 5 tokens, adapter 'default' has 4"):
        model.base_model.set_kv_prefix(prefix)
    with pytest.raises(ValueError, match="`prefix` was made by another model"):
        model.base_model.set_kv_prefix(KVPrefix.from_input_ids(tiny_model("qwen3"), token_ids(4)))
    with pytest.raises(ValueError, match="`adapter_name='other'` is not loaded; there are: default"):
        model.base_model.set_kv_prefix(prefix[:4], "other")
    with pytest.raises(ValueError, match="NaN"):
        model.base_model.set_kv_prefix(KVPrefix(tuple(k * torch.nan for k in prefix[:4].keys), prefix[:4].values))


def test_it_cannot_be_merged() -> None:
    model = get_peft_model(tiny_model("llama"), CartridgeConfig(num_tokens=4))
    with pytest.raises(ValueError, match=r"cannot be merged.*unload\(\)"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
