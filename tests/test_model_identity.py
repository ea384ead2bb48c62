"""The fingerprint of a model: one for all dtypes, and another one for another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from peft_cartridges import CartridgeConfig, SelfStudySynthesizer
from peft_cartridges.model_identity import model_fingerprint
from tests.self_study import runs
from tests.tiny_models import tiny_model, tiny_tokenizer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _fingerprint(model: Any) -> str:
    return model_fingerprint(model)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3_moe"])
def test_it_is_the_same_in_every_dtype(name: str) -> None:
    assert len({_fingerprint(tiny_model(name, dtype=dtype)) for dtype in DTYPES}) == 1


def test_numbers_that_a_dtype_cannot_hold_make_no_difference() -> None:
    # Rounded to zero, to infinity, and to a tie that bfloat16 rounds otherwise than the number itself.
    numbers = torch.tensor(
        [1e-9, -1e-9, 1e-40, -1e-40, 7e4, -7e4, 1 + 2**-8 + 2**-13, -(1 + 2**-8 + 2**-13), 0.0, -0.0]
    )
    assert (numbers.half().bfloat16() != numbers.bfloat16()).any()

    def model() -> Any:
        made = tiny_model()
        with torch.no_grad():
            made.lm_head.weight[0, : len(numbers)] = numbers
        return made

    assert len({_fingerprint(model().to(dtype)) for dtype in DTYPES}) == 1


@pytest.mark.parametrize("stored", DTYPES)
def test_it_is_the_same_however_a_stored_model_is_loaded(tmp_path: Path, stored: torch.dtype) -> None:
    tiny_model(dtype=stored).save_pretrained(tmp_path)
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype) for dtype in DTYPES]
    assert len({_fingerprint(model) for model in loaded}) == 1


def test_other_weights_are_told_apart() -> None:
    trained = tiny_model()
    with torch.no_grad():
        for matrix in (parameter for parameter in trained.parameters() if parameter.ndim > 1):
            matrix += 1e-3 * matrix.std() * torch.randn_like(matrix)
    models = [*(tiny_model(seed=seed) for seed in range(3)), tiny_model(hidden_size=64), trained]
    assert len(set(map(_fingerprint, models))) == len(models)


@pytest.mark.parametrize("config", [CartridgeConfig(num_tokens=4), LoraConfig(target_modules=["q_proj"])])
def test_an_adapter_is_no_part_of_it(config: Any) -> None:
    assert _fingerprint(get_peft_model(tiny_model(), config)) == _fingerprint(tiny_model())


def test_a_run_is_carried_on_in_another_dtype(tmp_path: Path) -> None:
    args = runs.settings(num_conversations=4)

    def rows(dtype: torch.dtype) -> list[list[int]]:
        synthesizer = SelfStudySynthesizer(tiny_model(dtype=dtype), tiny_tokenizer(), args)
        return synthesizer.synthesize(runs.TEXT, tmp_path)["input_ids"]

    assert rows(torch.bfloat16) == rows(torch.float32)
