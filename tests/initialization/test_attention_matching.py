"""Compaction by attention matching."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

from peft_cartridges import CartridgeConfig, KVPrefix, UnsupportedModelError, initialize_cartridge, shared_prefix
from peft_cartridges.chat import ChatCodec
from peft_cartridges.initialization.attention_matching import _common_direction, _non_negative_factors, _ridge, surprise
from peft_cartridges.initialization.corpus_tokens import recitations
from tests.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

TEXT = " ".join(f"the captain says w{number} ." for number in range(50, 80))


def _matched(architecture: str = "llama", num_tokens: int = 16, text: str = TEXT, **options: Any) -> KVPrefix:
    model = get_peft_model(tiny_model(architecture), CartridgeConfig(num_tokens=num_tokens))
    return initialize_cartridge(model, tiny_tokenizer(), text=text, strategy="attention_matching", **options)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"gpt2", "deepseek_v3"}))
def test_all_tokens_are_the_whole_text(architecture: str) -> None:
    ids = ChatCodec(None, tiny_tokenizer()).encode_context(TEXT)
    prefix = _matched(architecture, len(ids))
    whole = KVPrefix.from_input_ids(tiny_model(architecture), ids)
    for have, want in zip(prefix.keys + prefix.values, whole.keys + whole.values, strict=True):
        torch.testing.assert_close(have, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_first_layer_gives_what_it_gave_with_the_text_better_with_fitted_values() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = ChatCodec(None, tokenizer).encode_context(TEXT)
    row = torch.tensor(recitations(model, tokenizer, ids[1:], chat_template=True)[:1])
    whole = KVPrefix.from_input_ids(model, ids)
    outputs: list[torch.Tensor] = []
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, args, output: outputs.append(args[0]))
    with shared_prefix(model, whole):
        model(row)
    errors = {}
    for ridge in (0.01, 1.0, 1e6):
        # Every query counts, so what is fitted is what is compared.
        with shared_prefix(model, _matched(value_ridge=ridge, share_of_queries=1.0)):
            model(row)
        errors[ridge] = (outputs[-1] - outputs[0]).norm()
    assert errors[0.01] < errors[1.0] < errors[1e6] and errors[0.01] < 0.8 * errors[1e6]


@torch.no_grad()
def test_surprise_is_what_the_model_alone_thinks_of_the_next_token() -> None:
    model, rows = tiny_model(), [[5, 6, 7, 8], [9, 10]]
    expected = []
    for row in rows:
        log_probs = model(torch.tensor([row])).logits[0].log_softmax(-1)
        expected += [-log_probs[at, following].item() for at, following in enumerate(row[1:])] + [0.0]
    torch.testing.assert_close(surprise(model, rows), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_closed_forms_are_what_they_minimize() -> None:
    torch.manual_seed(0)
    inputs, targets, importance = torch.rand(40, 6), torch.rand(40, 3), torch.rand(40, 1)
    solution = _ridge(inputs, targets, importance, 0.1).requires_grad_()
    held = 0.1 * (inputs.square() * importance).sum(0).mean()
    loss = (importance * (inputs @ solution - targets).square()).sum() + held * solution.square().sum()
    assert torch.autograd.grad(loss, solution)[0].abs().max() < 1e-4
    factor = torch.tensor([0.5, 1.0, 2.0, 4.0, 0.1, 3.0])
    found = _non_negative_factors(inputs, inputs @ factor, importance, 1e-6)
    torch.testing.assert_close(inputs @ found, inputs @ factor, atol=0.05, rtol=0.05)
    query = torch.randn(40, 8) + torch.ones(8)
    direction = _common_direction(query)
    assert ((query @ direction) - 1).square().mean() < (
        (query @ query.mean(0) / query.mean(0).norm() ** 2) - 1
    ).square().mean()


def test_folded_biases_change_the_keys_and_a_text_beyond_the_window_is_compacted_in_parts() -> None:
    plain, biased = _matched(), _matched(key_bias=True)
    assert not torch.allclose(plain.keys[0], biased.keys[0])
    tokenizer = tiny_tokenizer()
    model = get_peft_model(tiny_model(max_position_embeddings=160), CartridgeConfig(num_tokens=31))
    prefix = initialize_cartridge(model, tokenizer, text=TEXT, strategy="attention_matching", value_ridge=1e9)
    ids = ChatCodec(None, tokenizer).encode_context(TEXT)
    last = KVPrefix.from_input_ids(tiny_model(), [ids[0], *ids[1 + (len(ids) - 1) * 2 // 3 :]])
    distance = (prefix.values[0][0][-10:, None] - last.values[0][0][None]).abs().amax(-1).amin(-1)
    assert prefix.num_tokens == 31 and distance.max() < 1e-4


def test_references_are_asked_too() -> None:
    assert not torch.equal(_matched().values[1], _matched(references=[list(range(40, 60))]).values[1])


def test_what_cannot_be_matched_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match='share compressed ones: use `strategy="most_attended"`'):
        _matched("deepseek_v3")
    with pytest.raises(ValueError, match="`share_of_queries` must be above 0 and at most 1, got 0"):
        _matched(share_of_queries=0)
    with pytest.raises(ValueError, match="`value_ridge` must be above 0, got 0"):
        _matched(value_ridge=0)
