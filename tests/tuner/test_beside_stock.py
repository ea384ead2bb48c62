"""Stock PEFT in the same process: its own configuration object still gives its own behaviour."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.cartridge.config import CartridgeConfig as StockConfig
from peft.tuners.cartridge.model import CartridgeEncoder
from peft.tuners.cartridge.utils import compose_cartridge_adapters
from safetensors.torch import load_file

from peft_cartridges import CartridgeConfig, KVPrefix
from tests.exactness import assert_close, cartridge_model
from tests.tiny_models import tiny_model, token_ids

ROWS = token_ids(2, 6, seed=1)


def _stock(**options: int) -> PeftModel:
    return get_peft_model(
        tiny_model("llama"), StockConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=8, **options)
    )


@pytest.mark.supports("Stock PEFT in the same process", "get, train, save, load; num_frozen_tokens={num_frozen_tokens}")
@pytest.mark.parametrize("num_frozen_tokens", [0, 1])
def test_a_stock_cartridge_lives_its_whole_life(num_frozen_tokens: int, tmp_path: Path) -> None:
    model = _stock(num_frozen_tokens=num_frozen_tokens)
    assert isinstance(model.prompt_encoder["default"], CartridgeEncoder)
    assert model.peft_config["default"].is_prompt_learning
    before = model.prompt_encoder["default"].weight.detach().clone()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    model(input_ids=ROWS, labels=ROWS).loss.backward()
    optimizer.step()
    after = model.prompt_encoder["default"].weight.detach()
    assert torch.equal(before[:num_frozen_tokens], after[:num_frozen_tokens])
    assert not torch.equal(before[num_frozen_tokens:], after[num_frozen_tokens:])
    model.eval()
    expected = model(input_ids=ROWS).logits.detach()
    model.save_pretrained(tmp_path)
    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"], after)
    config = StockConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=8, num_frozen_tokens=num_frozen_tokens,
                         num_layers=2, token_dim=16, num_attention_heads=2, inference_mode=True)  # fmt: skip
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, config=config).eval()
    assert isinstance(again.prompt_encoder["default"], CartridgeEncoder)
    assert_close(again(input_ids=ROWS).logits.detach(), expected, 1e-6)
    ours = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert isinstance(PeftConfig.from_pretrained(tmp_path), CartridgeConfig)
    assert_close(ours(input_ids=ROWS).logits, expected)


def test_a_stock_cartridge_generates() -> None:
    stock = _stock().eval()
    ours = get_peft_model(tiny_model("llama"), CartridgeConfig(num_tokens=8)).eval()
    flat = stock.get_prompt_embedding_to_save("default")
    ours.base_model.set_kv_prefix(KVPrefix.from_prompt_embeddings(flat, num_layers=2, num_heads=2))
    options = {"attention_mask": torch.ones_like(ROWS), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert stock.generate(input_ids=ROWS, **options).tolist() == ours.generate(input_ids=ROWS, **options).tolist()


def test_stock_peft_composes_saved_cartridges(tmp_path: Path) -> None:
    base = tiny_model("llama")
    parts = [KVPrefix.from_input_ids(base, token_ids(length, seed=length)) for length in (5, 3)]
    for name, prefix in zip("ab", parts, strict=True):
        cartridge_model(tiny_model("llama"), prefix).save_pretrained(tmp_path / name)
    compose_cartridge_adapters([tmp_path / "a", tmp_path / "b"], output_path=tmp_path / "both")
    both = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "both").eval()
    assert both.peft_config["default"].num_tokens == 8
    expected = cartridge_model(base, KVPrefix.concatenate(parts)).eval()
    assert_close(both(input_ids=ROWS).logits, expected(input_ids=ROWS).logits, 1e-6)


def test_other_prompt_learning_methods_are_untouched() -> None:
    from peft import PrefixTuningConfig

    model = get_peft_model(tiny_model("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert model(input_ids=ROWS).logits.shape == (2, 6, 128)


def test_both_kinds_at_once() -> None:
    stock, base = _stock().eval(), tiny_model("llama")
    ours = cartridge_model(base, KVPrefix.from_input_ids(base, token_ids(8)))
    alone = stock(input_ids=ROWS).logits
    ours(input_ids=ROWS)
    assert torch.equal(stock(input_ids=ROWS).logits, alone)
