"""Training: gradient checkpointing, mixed precision, quantized and offloaded bases give the gradients they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peft_cartridges import CartridgeConfig, KVPrefix
from tests.exactness import assert_close, cartridge_model, pad, past_key_values_logits
from tests.tiny_models import tiny_model, token_ids

NAMES = ["llama", "gemma3", "qwen3_moe", "gpt_oss", "gpt2", "deepseek_v3"]


def _prefix(name: str) -> KVPrefix:
    return KVPrefix.from_input_ids(tiny_model(name), token_ids(12))


def _batch() -> dict[str, Tensor]:
    batch = pad([token_ids(length, seed=length) for length in (6, 3, 11)], "right")
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def _grads(model: nn.Module, **batch: Any) -> list[Tensor]:
    """Gradients of the cartridge, after one backward; of nothing else."""
    model.train()
    model(**(batch or _batch())).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None and "kv_prefix_" not in name] == []
    grads = [p.grad for name, p in model.named_parameters() if p.requires_grad and "kv_prefix_" in name]
    assert all(grad is not None for grad in grads)
    return [grad for grad in grads if grad is not None]


@pytest.mark.supports("Training", "gradient checkpointing, use_reentrant={reentrant}", on="{name}")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing(name: str, reentrant: bool, when: str) -> None:
    prefix = _prefix(name)
    expected = _grads(cartridge_model(tiny_model(name), prefix))
    model = tiny_model(name)
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if when == "before":
        model.gradient_checkpointing_enable(**options)
        peft_model = cartridge_model(model, prefix)
    else:  # as trainers do it
        peft_model = cartridge_model(model, prefix)
        peft_model.gradient_checkpointing_enable(**options)
        peft_model.enable_input_require_grads()
    calls = _count_forwards(peft_model)
    for actual, grad in zip(_grads(peft_model), expected, strict=True):
        assert_close(actual, grad, 1e-5)
    assert calls[0] == 2, "nothing was computed anew"


def _count_forwards(model: PeftModel) -> list[int]:
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    model.base_model.cartridge_layers()[0].register_forward_hook(count)
    return calls


@pytest.mark.supports("Training", "autocast to bfloat16", on="{name}")
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_autocast_to_bfloat16(name: str) -> None:
    prefix = _prefix(name)
    expected = _grads(cartridge_model(tiny_model(name), prefix))
    model = cartridge_model(tiny_model(name), prefix)
    with torch.autocast("cpu", torch.bfloat16):
        actual = _grads(model)
    assert all(grad.dtype == torch.float32 for grad in actual)
    cosine = torch.nn.functional.cosine_similarity(
        *(torch.cat([g.flatten() for g in gs]) for gs in (actual, expected)), dim=0
    )
    assert cosine > 0.98


@pytest.mark.supports("Training", "bfloat16 base, autocast_adapter_dtype={autocast}")
@pytest.mark.parametrize("autocast", [True, False])
def test_autocast_adapter_dtype(autocast: bool) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    peft_model = get_peft_model(
        model, CartridgeConfig(num_tokens=12, num_frozen_tokens=2), autocast_adapter_dtype=autocast
    )
    peft_model.base_model.set_kv_prefix(_prefix("llama"))
    layer = peft_model.base_model.cartridge_layers()[0]
    expected = torch.float32 if autocast else torch.bfloat16
    for name in ("key", "value", "frozen_key", "frozen_value"):
        parameter = getattr(layer, f"kv_prefix_{name}")["default"]
        assert (parameter.dtype, parameter.requires_grad) == (expected, not name.startswith("frozen")), name
    assert all(grad.dtype == expected and grad.isfinite().all() for grad in _grads(peft_model))
    assert peft_model.generate(input_ids=token_ids(1, 4), max_new_tokens=2, pad_token_id=0).shape[1] <= 6


def test_a_loaded_adapter_in_a_bfloat16_base(tmp_path: Path) -> None:
    cartridge_model(tiny_model("llama"), _prefix("llama")).save_pretrained(tmp_path)
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = tiny_model("llama", dtype=torch.bfloat16)
        peft_model = PeftModel.from_pretrained(model, tmp_path, is_trainable=True, autocast_adapter_dtype=autocast)
        assert peft_model.base_model.get_kv_prefix().dtype == dtype
        learning = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
        assert learning and not any("frozen" in name for name in learning)


def _quantized_by_torchao(model: nn.Module) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def _quantized_by_bitsandbytes(model: nn.Module, folder: Path, **options: Any) -> nn.Module:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}, dtype=torch.float32
    )


def _quantized(how: str, folder: Path) -> nn.Module:
    if how.startswith("torchao"):
        return _quantized_by_torchao(tiny_model("llama"))
    options = {"load_in_8bit": True} if "8" in how else {"load_in_4bit": True}
    wide = tiny_model("llama", hidden_size=64, intermediate_size=64)  # quantized in blocks of 64
    return _quantized_by_bitsandbytes(wide, folder, **options).eval()


@pytest.mark.supports("Training", "quantized base", on="{how}")
@pytest.mark.parametrize("how", ["torchao int8", "bitsandbytes 8 bit", "bitsandbytes 4 bit"])
def test_a_quantized_base(how: str, tmp_path: Path) -> None:
    model = _quantized(how, tmp_path / "base")
    prefix = KVPrefix.from_input_ids(model, token_ids(12))
    row = token_ids(6, seed=1)
    expected = past_key_values_logits(model, prefix, row)
    peft_model = cartridge_model(model, prefix)
    with torch.no_grad():
        assert_close(peft_model(input_ids=row[None]).logits[0], expected, 1e-2)
    peft_model.save_pretrained(tmp_path / "adapter")
    # Loaded anew: bitsandbytes packs 4-bit weights at the first inference on a CPU, and does not train them after.
    again = PeftModel.from_pretrained(_quantized(how, tmp_path / "base"), tmp_path / "adapter", is_trainable=True)
    assert all(grad.abs().sum() > 0 for grad in _grads(again))
    again.eval()
    with torch.no_grad():
        assert_close(again(input_ids=row[None]).logits[0], expected, 1e-2)


@pytest.mark.supports("Training", "`device_map`", on="{device_map}")
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
def test_a_device_map(device_map: Any, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, dtype=torch.float32)
    prefix = _prefix("llama")
    expected = _grads(cartridge_model(tiny_model("llama"), prefix))
    for actual, grad in zip(_grads(cartridge_model(model, prefix)), expected, strict=True):
        assert_close(actual, grad)


@pytest.mark.supports("Training", "layers offloaded to disk, inference")
def test_layers_offloaded_to_disk(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
                  "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    prefix, row = _prefix("llama"), token_ids(6, seed=1)
    expected = past_key_values_logits(tiny_model("llama"), prefix, row)
    from peft_cartridges import shared_prefix

    with torch.no_grad(), shared_prefix(model, prefix):
        assert_close(model(input_ids=row[None]).logits[0], expected)
    peft_model = cartridge_model(model, prefix)
    with torch.no_grad():
        assert_close(peft_model(input_ids=row[None]).logits[0], expected)
    peft_model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")
    with torch.no_grad():
        assert_close(again(input_ids=row[None]).logits[0], expected)


def test_low_cpu_mem_usage_of_the_base(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, low_cpu_mem_usage=True, dtype=torch.float32)
    prefix, row = _prefix("llama"), token_ids(6, seed=1)
    expected = past_key_values_logits(tiny_model("llama"), prefix, row)
    with torch.no_grad():
        assert_close(cartridge_model(model, prefix)(input_ids=row[None]).logits[0], expected)


def test_attention_dropout_falls_back_to_concatenation() -> None:
    """Dropout on attention weights needs the weights; the fast path says so instead of leaving it out."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    peft_model = cartridge_model(model, _prefix("llama")).train()
    first, second = (peft_model(**_batch()).loss.item() for _ in range(2))
    assert first != second
    for layer in peft_model.base_model.cartridge_layers():
        layer.adapter_configs["default"].attention = "merged"
    with pytest.raises(ValueError, match='"merged" cannot apply dropout'):
        peft_model(**_batch())


def test_attention_weights_are_given_where_asked_for() -> None:
    model = tiny_model("llama", attn="eager")
    peft_model = cartridge_model(model, _prefix("llama"))
    attentions = peft_model(input_ids=token_ids(2, 5), output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, 4, 5, 17)] * 2
    assert_close(attentions[0].sum(-1), torch.ones(2, 4, 5))


def test_a_sequence_classifier_takes_a_cartridge() -> None:
    """Other heads than a language model's: PEFT's own task types."""
    import transformers

    config = tiny_model("llama").config
    config.num_labels = 3
    model = transformers.LlamaForSequenceClassification(config)
    peft_model = get_peft_model(model, CartridgeConfig(num_tokens=4, task_type="SEQ_CLS"))
    batch = _batch()
    del batch["labels"]
    peft_model(**batch, labels=torch.tensor([0, 2, 1])).loss.backward()
    trained = {name.split(".")[-2] if "kv_prefix" in name else "head" for name, p in peft_model.named_parameters()
               if p.grad is not None}  # fmt: skip
    assert trained == {"kv_prefix_key", "kv_prefix_value", "head"}
