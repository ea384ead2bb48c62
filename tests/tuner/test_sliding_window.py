"""What a cartridge is to sliding-window layers: `windowed`, exactly `past_key_values`; `pinned`, always in sight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_cartridges import KVPrefix, shared_prefix
from tests.exactness import assert_close, cartridge_model, pad, past_key_values_generate, past_key_values_logits, unpad
from tests.tiny_models import WINDOW, tiny_model, token_ids

SLIDING = ["mistral", "gemma2", "gemma3", "gpt_oss"]
LENGTHS = (21, 3, 11)
GENERATE = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}


def _rows() -> list[Tensor]:
    return [token_ids(length, seed=length) for length in LENGTHS]


def _pinned_logits(model: nn.Module, prefix: KVPrefix, row: Tensor) -> Tensor:
    """By plain transformers, given masks in which the prefix is always in sight."""
    distance = torch.arange(len(row))[:, None] - torch.arange(len(row))
    in_front = torch.ones(len(row), prefix.num_tokens, dtype=torch.bool)
    masks = {}
    for name, own in {
        "full_attention": distance >= 0,
        "sliding_attention": (distance >= 0) & (distance < WINDOW),
    }.items():
        seen = torch.cat([in_front, own], dim=1)[None, None]
        masks[name] = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    mask = masks if getattr(model.config, "layer_types", None) else masks["sliding_attention"]
    positions = torch.arange(len(row))[None] + prefix.num_tokens
    with torch.no_grad():
        return model(
            input_ids=row[None], attention_mask=mask, position_ids=positions, past_key_values=prefix.to_cache()
        ).logits[0]


@pytest.mark.supports("Sliding windows", "`windowed`", on="{name}")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_tokens", [3, WINDOW - 1, WINDOW, 30])
@pytest.mark.parametrize("name", SLIDING)
def test_windowed_is_past_key_values_of_each_row(name: str, num_tokens: int, side: str) -> None:
    model = tiny_model(name)
    prefix = KVPrefix.from_input_ids(model, token_ids(num_tokens))
    batch = pad(_rows(), side)
    expected = [past_key_values_logits(model, prefix, row) for row in _rows()]
    with torch.no_grad():
        logits = unpad(cartridge_model(model, prefix)(**batch).logits, batch)
    for row_logits, row_expected in zip(logits, expected, strict=True):
        assert_close(row_logits, row_expected)


@pytest.mark.supports("Sliding windows", "`pinned`", on="{name}")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", SLIDING)
def test_pinned_tokens_stay_in_sight(name: str, side: str) -> None:
    model = tiny_model(name)
    prefix = KVPrefix.from_input_ids(model, token_ids(12))
    batch = pad(_rows(), side)
    expected = [_pinned_logits(model, prefix, row) for row in _rows()]
    assert (expected[0] - past_key_values_logits(model, prefix, _rows()[0])).abs().max() > 0.1, "the readings agree"
    with torch.no_grad(), shared_prefix(model, prefix, sliding_window="pinned"):
        by_context = unpad(model(**batch).logits, batch)
    with torch.no_grad():
        by_tuner = unpad(cartridge_model(model, prefix, sliding_window="pinned")(**batch).logits, batch)
    for row_expected, *logits in zip(expected, by_context, by_tuner, strict=True):
        for row_logits in logits:
            assert_close(row_logits, row_expected)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", SLIDING)
def test_windowed_generation_far_past_the_window(name: str, cache: str | None) -> None:
    model = tiny_model(name)
    prefix, rows = KVPrefix.from_input_ids(model, token_ids(6)), token_ids(2, 5, seed=1)
    expected = past_key_values_generate(model, prefix, rows, **GENERATE)
    output = cartridge_model(model, prefix).generate(
        input_ids=rows, attention_mask=torch.ones_like(rows), cache_implementation=cache,
        return_dict_in_generate=True, output_scores=True, **GENERATE,
    )  # fmt: skip
    assert output.sequences.tolist() == expected.sequences.tolist()
    for step, expected_step in zip(output.scores, expected.scores, strict=True):
        assert_close(step, expected_step)


@pytest.mark.parametrize("reading", ["windowed", "pinned"])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", SLIDING)
def test_generation_is_that_of_forwards_without_a_cache(name: str, cache: str | None, reading: str) -> None:
    """Left padding, keys that have left the window, a static cache: what was cached must not change what is seen."""
    model = tiny_model(name)
    peft_model = cartridge_model(model, KVPrefix.from_input_ids(model, token_ids(12)), sliding_window=reading)
    batch = pad(_rows(), "left")
    del batch["position_ids"]
    sequences = peft_model.generate(**batch, cache_implementation=cache, **GENERATE)
    for row, sequence in zip(_rows(), sequences, strict=True):
        whole = sequence[max(LENGTHS) - len(row) :]
        with torch.no_grad():
            logits = peft_model(input_ids=whole[None], use_cache=False).logits[0]
        logits[:, model.config.eos_token_id] = -torch.inf  # as `min_new_tokens` does
        assert logits[len(row) - 1 : -1].argmax(-1).tolist() == whole[len(row) :].tolist()


@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize("lengths", [(3, 4), (9, 5)])
def test_nested_prefixes_leave_the_window_as_one(name: str, lengths: tuple[int, int]) -> None:
    model = tiny_model(name)
    prefixes = [KVPrefix.from_input_ids(model, token_ids(length, seed=length)) for length in lengths]
    row = token_ids(6, seed=1)
    expected = past_key_values_logits(model, KVPrefix.concatenate(prefixes), row)
    with torch.no_grad(), shared_prefix(model, prefixes[0]), shared_prefix(model, prefixes[1]):
        assert_close(model(input_ids=row[None]).logits[0], expected)
