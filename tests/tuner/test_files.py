"""Adapter files: stock PEFT's format both ways, our extended one, and what is refused before it touches a model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.tuners.cartridge.config import CartridgeConfig as StockConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_cartridges import CartridgeConfig, KVPrefix
from tests.exactness import assert_close, cartridge_model
from tests.tiny_models import ARCHITECTURES, tiny_model, token_ids

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILE = "adapter_model.safetensors"
NOT_STOCK = {
    "deepseek_v3": "latent keys and values of different width",
    "gemma4": "layers of two head sizes",
}


def _load_stock(model: torch.nn.Module, folder: Path, **options: Any) -> PeftModel:
    """As stock PEFT would load it: with its own configuration class, which gives its own prompt encoder."""
    config = StockConfig(**{k: v for k, v in json.loads((folder / "adapter_config.json").read_text()).items()
                            if k in StockConfig.__dataclass_fields__ and k != "peft_type"})  # fmt: skip
    config.inference_mode = True
    stock = PeftModel.from_pretrained(model, folder, config=config, **options).eval()
    assert "prompt_encoder" in dict(stock.named_children()), "stock PEFT was meant to load this"
    return stock


@pytest.mark.supports("Files, both ways with stock PEFT", "num_frozen_tokens={num_frozen_tokens}", on="{dtype}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_frozen_tokens", [0, 1])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_ours_loads_into_stock_and_stock_into_ours(
    name: str, num_frozen_tokens: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model(name, dtype=dtype)
    prefix = KVPrefix.from_input_ids(model, token_ids(10))
    rows = token_ids(2, 6, seed=1)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    ours = cartridge_model(model, prefix, num_frozen_tokens=num_frozen_tokens)
    expected = ours(input_ids=rows).logits.detach()
    ours.save_pretrained(tmp_path / "ours")
    stock = _load_stock(tiny_model(name, dtype=dtype), tmp_path / "ours")
    assert_close(stock(input_ids=rows).logits, expected, tolerance)
    stock.save_pretrained(tmp_path / "stock")
    again = PeftModel.from_pretrained(tiny_model(name, dtype=dtype), tmp_path / "stock").eval()
    assert isinstance(again.peft_config["default"], CartridgeConfig)
    assert again.peft_config["default"].num_frozen_tokens == num_frozen_tokens
    assert_close(again(input_ids=rows).logits.detach(), expected, tolerance)
    tensors = [load_file(tmp_path / folder / FILE) for folder in ("ours", "stock")]
    assert [list(file) for file in tensors] == [["prompt_embeddings"]] * 2
    assert torch.equal(tensors[0]["prompt_embeddings"], tensors[1]["prompt_embeddings"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    prefix = KVPrefix.from_input_ids(model, token_ids(10))
    rows = token_ids(2, 6, seed=1)
    ours = cartridge_model(model, prefix)
    expected = ours(input_ids=rows).logits.detach()
    ours.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / FILE))
    if name in NOT_STOCK:
        assert names == {f"layers.{i}.{part}" for i in range(prefix.num_layers) for part in ("key", "value")}
    else:
        assert names == {"prompt_embeddings"}
    again = PeftModel.from_pretrained(tiny_model(name), tmp_path).eval()
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert_close(again(input_ids=rows).logits, expected, 1e-6)
    trainable = PeftModel.from_pretrained(tiny_model(name), tmp_path, is_trainable=True)
    assert any(parameter.requires_grad for parameter in trainable.parameters())


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in NOT_STOCK])
def test_stock_peft_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    """Where stock PEFT can run a cartridge at all; where it cannot, our file is at least what it would write."""
    model = tiny_model(name)
    prefix = KVPrefix.from_input_ids(model, token_ids(10))
    rows = token_ids(2, 6, seed=1)
    ours = cartridge_model(model, prefix)
    expected = ours(input_ids=rows).logits.detach()
    ours.save_pretrained(tmp_path)
    stock = _load_stock(tiny_model(name), tmp_path)
    if (reason := STOCK_DIFFERS.get(name)) is not None:
        pytest.skip(f"stock PEFT on this architecture: {reason}")
    assert_close(stock(input_ids=rows).logits.detach(), expected)


STOCK_DIFFERS: dict[str, str] = {}


def test_stock_peft_reads_our_configuration_without_a_warning(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cartridge_model(model, KVPrefix.from_input_ids(model, token_ids(10))).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(fields) - {"peft_version"} <= set(StockConfig.__dataclass_fields__) | {"auto_mapping"}
    assert fields["peft_type"] == "CARTRIDGE" and fields["task_type"] == "CAUSAL_LM"
    assert (fields["num_virtual_tokens"], fields["num_frozen_tokens"]) == (10, 1)
    assert (fields["num_layers"], fields["num_attention_heads"], fields["token_dim"]) == (2, 2, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StockConfig(**{name: value for name, value in fields.items() if name != "peft_version"})


def test_the_configuration_round_trips_with_our_fields(tmp_path: Path) -> None:
    config = CartridgeConfig(num_tokens=7, num_frozen_tokens=3, attention="concatenated", sliding_window="pinned")
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, CartridgeConfig)
    assert (again.num_tokens, again.num_frozen_tokens) == (7, 3)
    assert (again.attention, again.sliding_window) == ("concatenated", "pinned")


def _saved(tmp_path: Path, name: str = "llama") -> Path:
    model = tiny_model(name)
    cartridge_model(model, KVPrefix.from_input_ids(model, token_ids(10))).save_pretrained(tmp_path)
    return tmp_path


def _edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def test_a_damaged_file_is_refused_by_tensor_and_reason(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    good = load_file(folder / FILE)["prompt_embeddings"]
    damaged: list[tuple[dict[str, torch.Tensor], str]] = [
        ({"prompt_embeddings": good[:9].clone()}, r"`prompt_embeddings`.*shape \(9, 64\).*ask for \(10, 64\)"),
        ({"prompt_embeddings": good[:, :48].clone()}, r"`prompt_embeddings`.*shape \(10, 48\).*ask for \(10, 64\)"),
        ({"prompt_embeddings": good.clone().index_fill_(0, torch.tensor(3), torch.nan)}, "`prompt_embeddings`.*NaN"),
        (
            {"prompt_embeddings": good.clone().index_fill_(0, torch.tensor(3), torch.inf)},
            "`prompt_embeddings`.*infinite",
        ),
        ({"prompt_embeddings": good.to(torch.int32)}, "`prompt_embeddings`.*dtype I32, expected one of F64"),
        ({"lora_A": good}, r"no tensor `prompt_embeddings` \(it has lora_A\)"),
    ]
    for tensors, message in damaged:
        save_file(tensors, folder / FILE)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(tiny_model("llama"), folder)


def test_a_damaged_file_of_one_tensor_per_layer_is_refused_by_tensor_and_reason(tmp_path: Path) -> None:
    folder = _saved(tmp_path, "deepseek_v3")
    _edit(folder, lambda tensors: tensors["layers.1.value"][0, 2].fill_(torch.nan))
    with pytest.raises(ValueError, match=r"`layers.1.value`.*NaN"):
        PeftModel.from_pretrained(tiny_model("deepseek_v3"), folder)
    _edit(folder, lambda tensors: tensors.pop("layers.1.value"))
    with pytest.raises(ValueError, match=r"no tensor `layers.1.value`"):
        PeftModel.from_pretrained(tiny_model("deepseek_v3"), folder)


def test_a_cartridge_for_another_base_model_is_refused(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    fields = json.loads((folder / "adapter_config.json").read_text())
    fields["base_model_name_or_path"] = "someone/tiny-llama"
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"`token_dim` is 16, but Qwen3ForCausalLM .* has 32.*'someone/tiny-llama'"):
        PeftModel.from_pretrained(tiny_model("qwen3"), folder)
    with pytest.raises(ValueError, match=r"`num_layers` is 2, but Gemma3ForCausalLM .* has 3"):
        PeftModel.from_pretrained(tiny_model("gemma3"), folder)
    with pytest.raises(ValueError, match="does not fit the model"):
        PeftModel.from_pretrained(tiny_model("deepseek_v3"), folder)


def test_low_cpu_mem_usage_loads_the_same(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    rows = token_ids(2, 6, seed=1)
    expected = PeftModel.from_pretrained(tiny_model("llama"), folder)(input_ids=rows).logits
    model = PeftModel.from_pretrained(tiny_model("llama"), folder, low_cpu_mem_usage=True)
    assert_close(model(input_ids=rows).logits, expected, 1e-6)
    model.load_adapter(folder, adapter_name="second", low_cpu_mem_usage=True)
    model.set_adapter("second")
    assert_close(model(input_ids=rows).logits, expected, 1e-6)


def test_modules_to_save_are_saved_beside(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), CartridgeConfig(num_tokens=4, modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(3)
    rows = token_ids(2, 6, seed=1)
    expected = model(input_ids=rows).logits
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / FILE)) == 2
    assert_close(PeftModel.from_pretrained(tiny_model("llama"), tmp_path)(input_ids=rows).logits, expected, 1e-6)


def test_transformers_own_loading_of_adapters_is_refused(tmp_path: Path) -> None:
    """It would leave the cartridge as random as it was injected, with no more than a report of missing keys."""
    folder = _saved(tmp_path / "adapter")
    remedy = r"use `PeftModel.from_pretrained\(model, …\)` or `get_peft_model"
    with pytest.raises(ValueError, match=remedy):
        tiny_model("llama").load_adapter(folder)
    with pytest.raises(ValueError, match=remedy):
        tiny_model("llama").add_adapter(CartridgeConfig(num_tokens=4))
    tiny_model("llama").save_pretrained(tmp_path / "base")
    fields = json.loads((folder / "adapter_config.json").read_text())
    fields["base_model_name_or_path"] = str(tmp_path / "base")
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=remedy):
        AutoModelForCausalLM.from_pretrained(folder)
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert model.base_model.get_kv_prefix().num_tokens == 10


def test_stock_names_are_still_there() -> None:
    assert peft.CartridgeConfig is StockConfig
