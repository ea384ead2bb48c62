"""Self-study of a hybrid and of a recurrent model, and what comes of it: adapter, card, `cartridges info`, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from peft_cartridges import CartridgeConfig, SelfStudyTrainer
from peft_cartridges.adapter_folder import read_cartridge
from peft_cartridges.cli.main import main
from peft_cartridges.evaluation import EvaluationConfig, evaluate_cartridge
from peft_cartridges.hub import load_facts
from tests.causal_lms import tiny_causal_lm
from tests.trainer.small_runs import CORPUS, GOLD, TEXT, TOKENIZER, losses, make_config


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2"])
def test_from_a_text_to_a_cartridge(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    num_tokens = 0 if name == "mamba2" else 8
    trainer = SelfStudyTrainer(
        model=tiny_causal_lm(name),
        args=make_config(tmp_path, max_steps=2, learning_rate=0.01),
        train_dataset=CORPUS,
        processing_class=TOKENIZER,
        peft_config=CartridgeConfig(num_tokens=num_tokens),
    )
    model: Any = trainer.model
    trainer.initialize_cartridge()
    before = model.base_model.get_kv_prefix()
    assert all(state["recurrent"].any() for state in before.states)  # of the text
    trainer.train()
    assert len(losses(trainer)) == 2
    after = model.base_model.get_kv_prefix()
    for old, new in zip(before.states, after.states, strict=True):
        assert not any(torch.equal(old[part], new[part]) for part in old)
    trainer.save_model()
    config, prefix = read_cartridge(tmp_path)
    assert config.num_tokens == num_tokens and len(prefix.states) == len(after.states)
    facts = load_facts(tmp_path)
    states = sum(tensor.numel() * 4 for state in after.states for tensor in state.values())
    keys_and_values = sum(tensor.numel() * 4 for tensor in (*after.keys, *after.values))
    assert facts.kv_bytes == states + keys_and_values
    if num_tokens:
        assert facts.corpus_tokens and facts.in_context_kv_bytes == states + keys_and_values // 8 * facts.corpus_tokens
    main(["info", str(tmp_path)])
    shown = capsys.readouterr().out
    assert f"of {len(after.states)} recurrent layers, {states // 4:,} numbers" in shown
    again = PeftModel.from_pretrained(tiny_causal_lm(name), tmp_path)
    row = torch.arange(8, 16)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=row).logits, model.eval()(input_ids=row).logits)
    report = evaluate_cartridge(
        again, TOKENIZER, text=TEXT, questions=GOLD, args=EvaluationConfig(max_new_tokens=2, bootstrap_samples=10)
    )
    cartridge = next(result for result in report.systems if result.name == "cartridge")
    assert cartridge.kv_bytes == facts.kv_bytes and cartridge.num_tokens == num_tokens
