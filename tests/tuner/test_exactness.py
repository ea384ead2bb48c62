"""The tuner is exact: against `past_key_values`, and its gradients against autograd through `past_key_values`."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from peft_cartridges import KVPrefix
from tests.exactness import (
    assert_close,
    cartridge_model,
    pad,
    past_key_values_generate,
    past_key_values_logits,
    unpad,
)
from tests.tiny_models import ARCHITECTURES, tiny_model, token_ids

LENGTHS = (6, 3, 11)


def _prefix(model: torch.nn.Module, num_tokens: int = 12) -> KVPrefix:
    return KVPrefix.from_input_ids(model, token_ids(num_tokens))


def _rows() -> list[Tensor]:
    return [token_ids(length, seed=length) for length in LENGTHS]


@pytest.mark.supports("Architectures", "cartridge, forward with padding on either side", on="{name}")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forward(name: str, side: str) -> None:
    model = tiny_model(name)
    prefix, batch = _prefix(model), pad(_rows(), side)
    expected = [past_key_values_logits(model, prefix, row) for row in _rows()]
    peft_model = cartridge_model(model, prefix)
    with torch.no_grad():
        logits = unpad(peft_model(**batch).logits, batch)
    for row_logits, row_expected in zip(logits, expected, strict=True):
        assert_close(row_logits, row_expected)


@pytest.mark.supports("Architectures", "cartridge, `generate` greedy and with beams", on="{name}")
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generate(name: str, beams: int) -> None:
    model = tiny_model(name)
    prefix, rows = _prefix(model), token_ids(2, 6, seed=1)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = past_key_values_generate(model, prefix, rows, beams, **options)
    output = cartridge_model(model, prefix).generate(
        input_ids=rows, attention_mask=torch.ones_like(rows), num_beams=beams, return_dict_in_generate=True,
        output_scores=True, **options,
    )  # fmt: skip
    assert output.sequences.tolist() == expected.sequences.tolist()
    for step, expected_step in zip(output.scores, expected.scores, strict=True):
        assert_close(step, expected_step)


@pytest.mark.supports("Architectures", "cartridge, gradients", on="{name}")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_those_of_past_key_values(name: str) -> None:
    model = tiny_model(name)
    prefix, rows = _prefix(model), token_ids(3, 6, seed=1)
    leaves = KVPrefix(
        tuple(key.clone().requires_grad_() for key in prefix.keys),
        tuple(value.clone().requires_grad_() for value in prefix.values),
    )
    logits = model(input_ids=rows, past_key_values=leaves.to_cache(len(rows))).logits
    weights = torch.randn(logits.shape)
    expected = torch.autograd.grad((logits * weights).sum(), [*leaves.keys, *leaves.values])
    for path in ("merged", "concatenated"):
        peft_model = cartridge_model(tiny_model(name), prefix, num_frozen_tokens=2, attention=path)
        (peft_model(input_ids=rows).logits * weights).sum().backward()
        layers = peft_model.base_model.cartridge_layers()
        keys = [layer.kv_prefix_key["default"].grad for layer in layers]
        values = [layer.kv_prefix_value["default"].grad for layer in layers]
        for grad, whole in zip([*keys, *values], expected, strict=True):
            assert_close(grad / whole.abs().max(), whole[:, 2:] / whole.abs().max())
        for layer in layers:
            assert layer.kv_prefix_frozen_key["default"].grad is None
            assert layer.kv_prefix_frozen_value["default"].grad is None


def _train(peft_model: PeftModel, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(peft_model.parameters(), lr=0.1, weight_decay=0.5)
    peft_model.train()
    for step in range(steps):
        ids = token_ids(2, 8, seed=step)
        peft_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peft_model.eval()


@pytest.mark.parametrize("num_frozen_tokens", [0, 1, 4])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_training_moves_the_trainable_tokens_and_nothing_else(name: str, num_frozen_tokens: int) -> None:
    model = tiny_model(name)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    prefix = _prefix(model)
    peft_model = cartridge_model(model, prefix, num_frozen_tokens=num_frozen_tokens)
    _train(peft_model)
    trained = peft_model.base_model.get_kv_prefix()
    for before, after in zip((*prefix.keys, *prefix.values), (*trained.keys, *trained.values), strict=True):
        assert torch.equal(before[:, :num_frozen_tokens], after[:, :num_frozen_tokens])
        assert ((before - after)[:, num_frozen_tokens:].abs() > 0.01).any(-1).all()
    for key, value in peft_model.unload().state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_a_cartridge_with_every_token_frozen_is_a_fixed_text() -> None:
    model = tiny_model("llama")
    prefix = _prefix(model)
    peft_model = cartridge_model(model, prefix, num_frozen_tokens=prefix.num_tokens)
    expected = past_key_values_logits(tiny_model("llama"), prefix, token_ids(5, seed=3))
    assert_close(peft_model(input_ids=token_ids(1, 5, seed=3)).logits[0].detach(), expected)


def test_changing_the_cartridge_changes_the_next_forward() -> None:
    """What inference keeps between forwards must not outlive the parameters it was made of."""
    model = tiny_model("llama")
    first, second = _prefix(model), KVPrefix.from_input_ids(model, token_ids(12, seed=5))
    row = token_ids(1, 5, seed=3)
    expected = past_key_values_logits(model, second, row[0])
    peft_model = cartridge_model(model, first)
    with torch.no_grad():
        before = peft_model(input_ids=row).logits[0]
        peft_model.base_model.set_kv_prefix(second)
        assert_close(peft_model(input_ids=row).logits[0], expected)
        peft_model.base_model.set_kv_prefix(first)
        assert_close(peft_model(input_ids=row).logits[0], before)
        layer = peft_model.base_model.cartridge_layers()[0]
        layer.kv_prefix_key["default"].data = layer.kv_prefix_key["default"].data * 2
        assert (peft_model(input_ids=row).logits[0] - before).abs().max() > 1e-3


def test_get_kv_prefix_is_a_copy() -> None:
    peft_model = cartridge_model(model := tiny_model("llama"), prefix := _prefix(model))
    peft_model.base_model.get_kv_prefix().keys[0].zero_()
    assert torch.equal(peft_model.base_model.get_kv_prefix().keys[0], prefix.keys[0])
