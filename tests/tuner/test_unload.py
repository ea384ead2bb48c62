"""Coming and going: `unload`, deep copies, state dicts, and a base model that is left as it was."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_cartridges import CartridgeConfig, KVPrefix
from tests.exactness import assert_close, cartridge_model, past_key_values_logits
from tests.tiny_models import ARCHITECTURES, tiny_model, token_ids

ROW = token_ids(6, seed=1)


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return model(input_ids=ROW[None]).logits[0]


def _state(model: nn.Module) -> list[Any]:
    """Everything of a model that an adapter could leave changed, by identity where identity matters."""
    return [
        (
            name,
            id(module),
            type(module),
            id(getattr(module, "config", None)),
            str(getattr(module, "config", None)),
            list(module._forward_pre_hooks),
            list(module._forward_hooks),
            sorted(module.__dict__),
            sorted(module._modules),
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.supports("Coming and going", "`unload` leaves the base model bit-identical", on="{name}")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_unload(name: str) -> None:
    model = tiny_model(name)
    prefix = KVPrefix.from_input_ids(model, token_ids(8))
    before, logits = _state(model), _logits(model)
    weights = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in model.state_dict().items()}
    peft_model = cartridge_model(model, prefix)
    assert _state(model) != before
    peft_model.train()(input_ids=ROW[None], labels=ROW[None]).loss.backward()
    peft_model.eval()
    unloaded = peft_model.unload()
    assert unloaded is model
    assert _state(model) == before
    assert set(model.state_dict()) == set(weights)
    for key, tensor in model.state_dict().items():
        pointer, value = weights[key]
        assert tensor.data_ptr() == pointer and torch.equal(tensor, value), key
    assert torch.equal(_logits(model), logits)


def test_a_second_cartridge_after_unload() -> None:
    model = tiny_model("llama")
    first, second = (KVPrefix.from_input_ids(model, token_ids(n, seed=n)) for n in (8, 5))
    expected = past_key_values_logits(model, second, ROW)
    cartridge_model(model, first).unload()
    assert_close(_logits(cartridge_model(model, second)), expected)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_a_second_cartridge_without_unload_shifts_positions_once() -> None:
    """As in a notebook whose cell is run twice."""
    model = tiny_model("llama")
    prefix = KVPrefix.from_input_ids(model, token_ids(8))
    expected, plain = past_key_values_logits(model, prefix, ROW), _logits(model)
    cartridge_model(model, prefix)
    again = cartridge_model(model, prefix)
    assert_close(_logits(again), expected)
    assert_close(_logits(again.unload()), plain, 1e-6)


def test_trained_modules_to_save_stay_as_with_any_adapter_of_peft() -> None:
    model = tiny_model("llama")
    logits = _logits(model)
    peft_model = get_peft_model(model, CartridgeConfig(num_tokens=4, modules_to_save=["lm_head"]))
    with torch.no_grad():
        peft_model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(3)
    with peft_model.disable_adapter():
        assert torch.equal(_logits(peft_model), logits)
    assert type(peft_model.unload().lm_head) is nn.Linear
    assert_close(_logits(model), 3 * logits, 1e-4)


@pytest.mark.supports("Coming and going", "deep copies", on="{name}")
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2_5_vl", "gemma3n"])
def test_a_deep_copy_is_a_model_of_its_own(name: str) -> None:
    model = tiny_model(name)
    first, second = (KVPrefix.from_input_ids(model, token_ids(8, seed=n)) for n in (1, 2))
    expected = [past_key_values_logits(model, prefix, ROW) for prefix in (first, second)]
    plain = _logits(model)
    original = cartridge_model(model, first)
    clone = copy.deepcopy(original)
    assert_close(_logits(clone), expected[0])
    clone.base_model.set_kv_prefix(second)
    assert_close(_logits(clone), expected[1])
    assert_close(_logits(original), expected[0])
    clone.set_adapter("default")
    with clone.disable_adapter():
        assert_close(_logits(clone), plain, 1e-6)
        assert_close(_logits(original), expected[0])
    assert_close(_logits(clone.unload()), plain, 1e-6)
    assert_close(_logits(original), expected[0])


def test_a_copy_of_the_copy_by_pickle() -> None:
    """As accelerate's and TRL's workers send models."""
    model = tiny_model("llama")
    prefix = KVPrefix.from_input_ids(model, token_ids(8))
    peft_model = cartridge_model(model, prefix)
    expected = _logits(peft_model)
    buffer = io.BytesIO()
    torch.save(peft_model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)  # house-ok: what the test itself wrote
    assert_close(_logits(twin), expected, 1e-6)


@pytest.mark.supports("Coming and going", "state dicts", on="{name}")
@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_state_dict_round_trip(name: str) -> None:
    model = tiny_model(name)
    prefix = KVPrefix.from_input_ids(model, token_ids(8))
    trained = cartridge_model(model, prefix)
    expected = _logits(trained)
    fresh = get_peft_model(tiny_model(name, seed=5), CartridgeConfig(num_tokens=8)).eval()
    assert (_logits(fresh) - expected).abs().max() > 0.1
    result = fresh.load_state_dict(trained.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert_close(_logits(fresh), expected, 1e-6)
