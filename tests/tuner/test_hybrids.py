"""Models that mix attention with layers of another memory: those are left out where the config says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache

from peft_cartridges import KVPrefix
from tests.exactness import assert_close, cartridge_model
from tests.tiny_models import HYBRIDS, tiny_model, token_ids

ROW = token_ids(6, seed=1)


def _reference(model: nn.Module, prefix: KVPrefix) -> Tensor:
    """By plain transformers: a cache whose attention layers are filled, and whose other layers are new."""
    cache = DynamicCache(config=model.config)
    held = [layer for layer in cache.layers if hasattr(layer, "keys")]
    for layer, key, value in zip(held, prefix.keys, prefix.values, strict=True):
        layer.update(key[None], value[None])
    with torch.no_grad():
        return model(input_ids=ROW[None], past_key_values=cache).logits[0]


@pytest.mark.supports("Hybrid models", "`skip_unsupported_layers=True`", on="{name}")
@pytest.mark.parametrize("name", HYBRIDS)
def test_left_out_where_the_config_says_so(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    prefix = KVPrefix.from_input_ids(model, token_ids(12))
    expected = _reference(model, prefix)
    peft_model = cartridge_model(model, prefix, skip_unsupported_layers=True)
    with torch.no_grad():
        assert_close(peft_model(input_ids=ROW[None]).logits[0], expected)
    peft_model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["skip_unsupported_layers"] is True
    if name != "falcon_h1":
        assert [shape is None for shape in fields["layer_shapes"]] == [True, False, True, False]
        assert fields["layer_format"] == 1
        names = {f"layers.{i}.{part}" for i in (1, 3) for part in ("key", "value")}
        assert set(load_file(tmp_path / "adapter_model.safetensors")) == names
    again = PeftModel.from_pretrained(tiny_model(name), tmp_path)
    with torch.no_grad():
        assert_close(again(input_ids=ROW[None]).logits[0], expected)
    output = again.generate(input_ids=ROW[None], attention_mask=torch.ones(1, 6), max_new_tokens=4, pad_token_id=0)
    assert output.shape[1] <= 10
    peft_model.train()(input_ids=ROW[None], labels=ROW[None]).loss.backward()
    assert all(p.grad is not None for p in peft_model.parameters() if p.requires_grad)


def test_a_file_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    model = tiny_model("lfm2")
    prefix = KVPrefix.from_input_ids(model, token_ids(12))
    cartridge_model(model, prefix, skip_unsupported_layers=True).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "layer_format": 2}))
    with pytest.raises(ValueError, match=r"`layer_format` is 2.*Upgrade peft-cartridges"):
        PeftModel.from_pretrained(tiny_model("lfm2"), tmp_path)
