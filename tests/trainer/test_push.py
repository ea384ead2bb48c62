"""`push_to_hub=True`: Trainer's own uploads, against a local Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.hub.conftest import hub  # noqa: F401 (a fixture)
from tests.hub.local_hub import LocalHub
from tests.trainer.small_runs import make_trainer


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_cartridge_and_card_are_pushed_and_the_text_is_not(
    hub: LocalHub,  # noqa: F811
    tmp_path: Path,
    strategy: str,
) -> None:
    trainer = make_trainer(
        tmp_path / "run", push_to_hub=True, hub_model_id="user/handbook", hub_strategy=strategy, plot=True,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    pushed = hub.files("user/handbook")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "cartridge.json"} <= set(pushed)
    assert not [name for name in pushed if name.startswith(("_", "checkpoint-"))]
    assert not [name for name, content in pushed.items() if b"captain of w" in content]
    card = ModelCard(pushed["README.md"].decode())
    assert 'load_cartridge("user/handbook")' in card.text
    assert "cartridge" in card.data.tags and "How it was made" in card.text
