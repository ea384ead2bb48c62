"""Where tokens stand behind a prefix, however a model is called: with a mask alone, packed, layer by layer, by TRL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.masking_utils import create_masks_for_generate

from peft_cartridges import KVPrefix, shared_prefix
from peft_cartridges.attention import find_attention_layers, find_decoder
from tests.exactness import assert_close, cartridge_model, pad, past_key_values_logits
from tests.tiny_models import tiny_model, token_ids

NAMES = ["llama", "qwen3", "mistral", "gemma3", "gpt2", "gpt_oss", "deepseek_v3", "qwen2_5_vl"]
LENGTHS = (3, 11, 7)


def _rows() -> list[Tensor]:
    return [token_ids(length, seed=length) for length in LENGTHS]


@pytest.mark.parametrize("form", ["mask of all tokens", "mask of all tokens as numbers", "four-dimensional mask"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_told_by_the_mask_alone(name: str, side: str, form: str) -> None:
    model = tiny_model(name)
    prefix = KVPrefix.from_input_ids(model, token_ids(12))
    batch = pad(_rows(), side)
    mask = batch["attention_mask"].bool()
    if form == "mask of all tokens as numbers":
        given: Tensor = mask.float()
    elif form == "four-dimensional mask":
        if name in ("mistral", "gemma3", "gpt_oss"):
            pytest.skip("such a mask is one for all layers, and these differ in their windows")
        given = mask[:, None, None] & torch.ones(mask.shape[1], mask.shape[1]).tril().bool()
    else:
        given = mask.long()
    with torch.no_grad(), shared_prefix(model, prefix):
        logits = model(input_ids=batch["input_ids"], attention_mask=given).logits
    for row, row_logits, real in zip(_rows(), logits, mask, strict=True):
        assert_close(row_logits[real], past_key_values_logits(model, prefix, row))


@pytest.mark.parametrize("name", NAMES)
def test_steps_on_a_cache_told_by_the_mask_alone(name: str) -> None:
    """A prefill and single steps of left-padded rows, without positions."""
    model = tiny_model(name)
    prefix = KVPrefix.from_input_ids(model, token_ids(12))
    batch = pad(_rows(), "left")
    mask = batch["attention_mask"]
    parts = []
    with torch.no_grad(), shared_prefix(model, prefix):
        output = model(input_ids=batch["input_ids"][:, :8], attention_mask=mask[:, :8], use_cache=True)
        parts.append(output.logits)
        for step in range(8, 11):
            output = model(
                input_ids=batch["input_ids"][:, step : step + 1],
                attention_mask=mask[:, : step + 1],
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            parts.append(output.logits)
    for row, row_logits, real in zip(_rows(), torch.cat(parts, 1), mask.bool(), strict=True):
        assert_close(row_logits[real], past_key_values_logits(model, prefix, row))


@pytest.mark.parametrize("hides", [torch.finfo(torch.float32).min, float("-inf"), -1e9, -1e4])
def test_additive_masks(hides: float) -> None:
    """Whatever a mask adds to hide a key."""
    model = tiny_model("llama")
    prefix = KVPrefix.from_input_ids(model, token_ids(12))
    row = token_ids(6, seed=1)
    mask = torch.full((6, 6), hides).triu(1)[None, None]
    with torch.no_grad(), shared_prefix(model, prefix):
        logits = model(input_ids=row[None], attention_mask=mask).logits[0]
    assert_close(logits, past_key_values_logits(model, prefix, row))


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_a_mask_for_each_kind_of_layer(name: str) -> None:
    model = tiny_model(name)
    prefix = KVPrefix.from_input_ids(model, token_ids(12))
    batch = pad(_rows(), "left")
    masks = create_masks_for_generate(
        config=model.config,
        inputs_embeds=model.get_input_embeddings()(batch["input_ids"]),
        attention_mask=batch["attention_mask"],
        past_key_values=None,
        position_ids=batch["position_ids"],
    )
    with torch.no_grad(), shared_prefix(model, prefix):
        logits = model(input_ids=batch["input_ids"], attention_mask=masks).logits
    for row, row_logits, real in zip(_rows(), logits, batch["attention_mask"].bool(), strict=True):
        assert_close(row_logits[real], past_key_values_logits(model, prefix, row))


def test_a_mask_that_reaches_to_the_end_of_a_static_cache() -> None:
    model = tiny_model("llama")
    prefix = KVPrefix.from_input_ids(model, token_ids(12))
    row = token_ids(6, seed=1)
    cache, mask = StaticCache(config=model.config, max_cache_len=10), torch.ones(1, 10, dtype=torch.long)
    with torch.no_grad(), shared_prefix(model, prefix):
        parts = [
            model(input_ids=piece[None], attention_mask=mask, past_key_values=cache).logits[0] for piece in row.split(3)
        ]
    assert_close(torch.cat(parts), past_key_values_logits(model, prefix, row))


@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens_q"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_packed_rows(name: str, told_by: str) -> None:
    """Several rows one behind the other, as padding-free collators give them."""
    model = tiny_model(name)
    prefix = KVPrefix.from_input_ids(model, token_ids(12))
    ids = torch.cat(_rows())[None]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    inputs: dict[str, Any] = {"position_ids": positions}
    if told_by == "cu_seq_lens_q":
        # sdpa learns from the mask which tokens belong together.
        number = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
        seen = (number[:, None] == number) & torch.ones(21, 21).tril().bool()
        if name == "mistral":
            seen = seen & (torch.arange(21)[:, None] - torch.arange(21) < 8)
        bounds = torch.tensor([0, 3, 14, 21], dtype=torch.int32)
        inputs = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "attention_mask": seen[None, None]}
    with torch.no_grad(), shared_prefix(model, prefix):
        logits = model(input_ids=ids, use_cache=False, **inputs).logits[0]
    for row, row_logits in zip(_rows(), logits.split(LENGTHS), strict=True):
        assert_close(row_logits, past_key_values_logits(model, prefix, row))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3"])
def test_a_model_with_one_attention_layer(name: str) -> None:
    model = tiny_model(name, num_hidden_layers=1)
    prefix = KVPrefix.from_input_ids(model, token_ids(12))
    row = token_ids(6, seed=1)
    found, decoder = find_decoder(model, find_attention_layers(model))
    assert decoder is model.get_decoder() and found
    with torch.no_grad(), shared_prefix(model, prefix):
        logits = model(input_ids=row[None]).logits[0]
    assert_close(logits, past_key_values_logits(model, prefix, row))


@pytest.mark.parametrize("name", NAMES)
def test_rollout_and_scoring_agree(name: str) -> None:
    """GRPO, RLOO and online DPO generate from left-padded prompts, and then score prompts and answers in one forward with
    a mask and no positions: the log-probabilities are the same."""
    model = tiny_model(name)
    model = cartridge_model(model, KVPrefix.from_input_ids(model, token_ids(12)))
    rollout, scored, answers = rollout_and_score(model, pad(_rows(), "left"))
    assert_close(scored.gather(2, answers[..., None]), rollout.gather(2, answers[..., None]), 1e-4)


def rollout_and_score(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    prompts = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    output: Any = model.generate(**prompts, **options, return_dict_in_generate=True, output_logits=True)
    rollout = torch.stack(output.logits, 1).log_softmax(-1)
    width = prompts["input_ids"].shape[1]
    mask = torch.cat([prompts["attention_mask"], torch.ones(len(rollout), 6, dtype=torch.long)], 1)
    with torch.no_grad():
        logits = model(input_ids=output.sequences, attention_mask=mask).logits
    return rollout, logits[:, width - 1 : -1].log_softmax(-1), output.sequences[:, width:]
