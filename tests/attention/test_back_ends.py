"""Every attention back end that a model can be loaded with gives the same; flash attention without its kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_cartridges import KVPrefix, shared_prefix
from peft_cartridges.attention.masks import flash_mask
from tests.exactness import assert_close, cartridge_model, pad, past_key_values_logits, unpad
from tests.tiny_models import tiny_model, token_ids

LENGTHS = (6, 3, 11)
BACK_ENDS = ["eager", "sdpa", "flex_attention", "flash_attention_2"]


def _model(name: str, back_end: str) -> nn.Module:
    if back_end != "flash_attention_2":
        return tiny_model(name, attn=back_end)
    # Without its kernels installed transformers does not load a model for flash attention; its masks need no kernels,
    # and while a prefix is active neither does anything else.
    model = tiny_model(name, attn="eager")
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation_internal"):
            module.config._attn_implementation_internal = back_end
    return model


def _rows() -> list[Tensor]:
    return [token_ids(length, seed=length) for length in LENGTHS]


def _reference(name: str, num_tokens: int = 12) -> tuple[KVPrefix, list[Tensor]]:
    model = tiny_model(name, attn="eager")
    prefix = KVPrefix.from_input_ids(model, token_ids(num_tokens))
    return prefix, [past_key_values_logits(model, prefix, row) for row in _rows()]


@pytest.mark.supports("Attention back ends", "padding on either side", on="{back_end}")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_forward(name: str, back_end: str, side: str) -> None:
    prefix, expected = _reference(name)
    model, batch = _model(name, back_end), pad(_rows(), side)
    with torch.no_grad(), shared_prefix(model, prefix):
        by_context = unpad(model(**batch).logits, batch)
    with torch.no_grad():
        by_tuner = unpad(cartridge_model(model, prefix)(**batch).logits, batch)
    for row_expected, *logits in zip(expected, by_context, by_tuner, strict=True):
        for row_logits in logits:
            assert_close(row_logits, row_expected)


@pytest.mark.supports("Attention back ends", "`generate`, {cache} cache", on="{back_end}")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generate(name: str, back_end: str, cache: str) -> None:
    if (back_end, cache) == ("flex_attention", "static"):
        pytest.skip("transformers' own `generate` cannot pair flex attention with a static cache")
    prefix, _ = _reference(name)
    batch = pad(_rows(), "left")
    del batch["position_ids"]
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = cartridge_model(_model(name, "eager"), prefix).generate(**batch, **options)
    output = cartridge_model(_model(name, back_end), prefix).generate(
        **batch, **options, cache_implementation=None if cache == "dynamic" else cache
    )
    assert output.tolist() == expected.tolist()


@pytest.mark.supports("Attention back ends", "training", on="{back_end}")
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_training(back_end: str) -> None:
    prefix, _ = _reference("llama")
    batch = pad(_rows(), "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    grads = []
    for implementation in ("eager", back_end):
        model = cartridge_model(_model("llama", implementation), prefix).train()
        model(**batch, labels=labels).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for expected, actual in zip(*grads, strict=True):
        assert_close(actual, expected)


@pytest.mark.supports("Attention back ends", "packed rows", on="{back_end}")
@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_packed_rows_are_those_of_separate_rows(name: str, back_end: str) -> None:
    prefix, expected = _reference(name)
    model = cartridge_model(_model(name, back_end), prefix)
    with torch.no_grad():
        logits = model(
            input_ids=torch.cat(_rows())[None],
            position_ids=torch.cat([torch.arange(length) for length in LENGTHS])[None],
            use_cache=False,
        ).logits[0]
    for row_logits, row_expected in zip(logits.split(LENGTHS), expected, strict=True):
        assert_close(row_logits, row_expected)


def test_flash_mask_of_sequence_lengths_is_that_of_positions() -> None:
    query = torch.zeros(1, 2, 9, 4)
    options = {"causal": True, "sliding_window": 3}
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    by_positions = flash_mask(None, query, 9, position_ids=positions, cu_seq_lens=None, **options)
    by_lengths = flash_mask(None, query, 9, position_ids=None, cu_seq_lens=torch.tensor([0, 4, 9]), **options)
    assert by_positions is not None and by_lengths is not None
    assert torch.equal(by_positions, by_lengths)
    for q in range(9):
        for k in range(9):
            same = (q < 4) == (k < 4)
            assert by_lengths[0, 0, q, k].item() == (same and k <= q and q - k < 3), (q, k)


def test_flash_mask_is_left_out_where_it_says_nothing() -> None:
    options = {"sliding_window": None, "position_ids": None, "cu_seq_lens": None}
    assert flash_mask(None, torch.zeros(2, 2, 5, 4), 5, causal=True, **options) is None
    assert flash_mask(None, torch.zeros(2, 2, 1, 4), 5, causal=True, **options) is None
    later = flash_mask(None, torch.zeros(2, 2, 2, 4), 5, causal=True, **options)
    assert later is not None
    assert later[0, 0].tolist() == [[True] * 4 + [False], [True] * 5]


@pytest.mark.cuda
@pytest.mark.supports("Attention back ends", "on a GPU", on="{back_end}")
@pytest.mark.parametrize("back_end", ["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"])
def test_on_a_gpu(back_end: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    prefix, expected = _reference("llama")
    if "flash" in back_end:
        pytest.importorskip(
            "flash_attn" if back_end.endswith("2") else "flash_attn_interface", reason="no flash attention"
        )
        model = tiny_model("llama", attn=back_end, dtype=torch.bfloat16).to("cuda")
    else:
        model = tiny_model("llama", attn=back_end).to("cuda")
    batch = pad(_rows(), "left")
    with torch.no_grad():
        logits = cartridge_model(model, prefix)(**{name: tensor.to("cuda") for name, tensor in batch.items()}).logits
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.2
    for row_logits, row_expected in zip(unpad(logits.float().cpu(), batch), expected, strict=True):
        assert_close(row_logits, row_expected, tolerance)
