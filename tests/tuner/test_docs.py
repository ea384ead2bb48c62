"""The examples of docs/tuner.md run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model

from peft_cartridges import CartridgeConfig, KVPrefix
from tests.exactness import pad
from tests.tiny_models import tiny_model, tiny_tokenizer, token_ids

PAGE = Path(__file__).parents[2] / "docs" / "tuner.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)


def _names(folder: Path) -> dict[str, Any]:
    """What the examples take for given."""
    for name, num_tokens in (("handbook", 5), ("minutes", 3)):
        get_peft_model(tiny_model(), CartridgeConfig(num_tokens=num_tokens)).save_pretrained(folder / name)
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "lora")
    batch = pad([token_ids(length, seed=length) for length in (5, 2, 4)], "left")
    del batch["position_ids"]
    return {
        "base_model": tiny_model(),
        "tokenizer": tiny_tokenizer(),
        "document": "the captain tells of the old harbor light",
        "batch": batch,
        "folder": folder / "saved",
        **{name: folder / name for name in ("handbook", "minutes", "lora")},
    }


def assert_runs(index: int, names: dict[str, Any]) -> None:
    """It raises nothing, and does something: every example makes or loads a model with a cartridge, or a prefix."""
    before = dict(names)
    exec(compile(EXAMPLES[index], f"{PAGE.name}, example {index}", "exec"), names)
    made = [value for name, value in names.items() if value is not before.get(name)]
    assert any(isinstance(value, (PeftModel, KVPrefix)) for value in made)


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_example(index: int, tmp_path: Path) -> None:
    assert_runs(index, _names(tmp_path))


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4
