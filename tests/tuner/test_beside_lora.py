"""A cartridge beside a LoRA in the same model, each loaded from its own folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_cartridges import CartridgeConfig, KVPrefix
from tests.exactness import assert_close, cartridge_model, past_key_values_generate, past_key_values_logits
from tests.tiny_models import tiny_model, token_ids

ROW = token_ids(6, seed=1)
GENERATE = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.fixture()
def folders(tmp_path: Path) -> tuple[Path, Path]:
    lora = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    )
    lora.save_pretrained(tmp_path / "lora")
    cartridge_model(tiny_model("llama"), _prefix()).save_pretrained(tmp_path / "cartridge")
    return tmp_path / "lora", tmp_path / "cartridge"


def _prefix() -> KVPrefix:
    return KVPrefix.from_input_ids(tiny_model("llama"), token_ids(10))


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return model(input_ids=ROW[None]).logits[0]


@pytest.mark.supports("Many cartridges", "beside a LoRA, each from its own folder")
@pytest.mark.parametrize("nested", [True, False])
def test_both_from_their_folders(folders: tuple[Path, Path], nested: bool) -> None:
    lora = PeftModel.from_pretrained(tiny_model("llama"), folders[0]).eval()
    with_both = past_key_values_logits(lora, _prefix(), ROW)
    expected = past_key_values_generate(lora.get_base_model(), _prefix(), ROW[None], **GENERATE).sequences
    with_lora = _logits(lora)
    both = PeftModel.from_pretrained(lora if nested else lora.get_base_model(), folders[1]).eval()
    assert_close(_logits(both), with_both)
    output = both.generate(input_ids=ROW[None], attention_mask=torch.ones(1, len(ROW)), **GENERATE)
    assert output.tolist() == expected.tolist()
    with both.disable_adapter():
        assert_close(_logits(both), with_lora, 1e-6)
    with lora.disable_adapter():  # PEFT's LoRA switches every adapter
        assert_close(_logits(both), _logits(tiny_model("llama")), 1e-6)
    assert_close(_logits(both), with_both)
    assert list(lora.peft_config) == list(both.peft_config) == ["default"]
    assert lora.peft_config["default"].peft_type == "LORA"
    unloaded = both.unload()
    assert unloaded is (lora if nested else lora.get_base_model())
    assert_close(_logits(lora), with_lora, 1e-6)
    assert_close(_logits(lora.unload()), _logits(tiny_model("llama")), 1e-6)


def test_the_cartridge_of_such_a_model_is_saved_by_itself(folders: tuple[Path, Path], tmp_path: Path) -> None:
    both = PeftModel.from_pretrained(PeftModel.from_pretrained(tiny_model("llama"), folders[0]), folders[1])
    both.save_pretrained(tmp_path / "again")
    tensors = load_file(tmp_path / "again" / "adapter_model.safetensors")
    before = load_file(folders[1] / "adapter_model.safetensors")
    assert list(tensors) == list(before) == ["prompt_embeddings"]
    assert torch.equal(tensors["prompt_embeddings"], before["prompt_embeddings"])


def test_training_both_together(folders: tuple[Path, Path]) -> None:
    lora = PeftModel.from_pretrained(tiny_model("llama"), folders[0], is_trainable=True)
    both = get_peft_model(lora, CartridgeConfig(num_tokens=4)).train()
    both(input_ids=ROW[None], labels=ROW[None]).loss.backward()
    kinds = {("lora" if "lora_" in name else "cartridge" if "kv_prefix_" in name else name)
             for name, parameter in both.named_parameters() if parameter.grad is not None}  # fmt: skip
    assert kinds == {"lora", "cartridge"}


def test_taking_the_lora_off_first_leaves_no_half_of_a_cartridge(folders: tuple[Path, Path]) -> None:
    """PEFT's LoRA takes every adapter off the model; nothing of the cartridge may stay behind."""
    lora = PeftModel.from_pretrained(tiny_model("llama"), folders[0]).eval()
    PeftModel.from_pretrained(lora.get_base_model(), folders[1])
    plain = lora.unload()
    assert_close(_logits(plain), _logits(tiny_model("llama")), 1e-6)


def test_merging_the_lora_under_a_cartridge_is_refused(folders: tuple[Path, Path]) -> None:
    lora = PeftModel.from_pretrained(tiny_model("llama"), folders[0]).eval()
    PeftModel.from_pretrained(lora.get_base_model(), folders[1])
    with pytest.raises(ValueError, match="cannot be merged"):
        lora.merge_and_unload()
