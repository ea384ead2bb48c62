"""The arithmetic of a project: what can be counted otherwise is counted otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_cartridges import SynthesisConfig
from peft_cartridges.cli import main
from peft_cartridges.model_cost import Machine, ModelShape
from peft_cartridges.self_study.scale import estimate_scale
from tests.self_study import runs
from tests.tiny_models import tiny_model, tiny_tokenizer

PAPER = SynthesisConfig(
    off_context_share=0.0,
    num_conversations=65_536, min_chunk_tokens=512, max_chunk_tokens=4096, recitation_share=0.0
)  # fmt: skip


def test_the_papers_setting_is_what_the_sizes_say() -> None:
    estimate = estimate_scale(PAPER, corpus_tokens=484_000, num_tokens=8192)
    assert estimate.disk["teacher's targets (hidden_states)"] == 65_536 * 96 * 4096 * 2
    assert estimate.disk["cartridge, as it is saved (float32)"] == 8192 * 32 * 2 * 8 * 128 * 4
    assert "does not fit" not in str(estimate) and "63 GB" in str(estimate)
    live = estimate_scale(
        SynthesisConfig(**{**vars(PAPER), "teacher_targets": "live"}), corpus_tokens=484_000, num_tokens=8192
    )
    assert sum(live.disk.values()) < 0.1 * sum(estimate.disk.values())
    assert any("the teacher in the step" in name for name in live.minutes)


def test_more_devices_take_less_time_and_a_small_one_is_told_about() -> None:
    one, eight = (
        estimate_scale(PAPER, corpus_tokens=484_000, num_tokens=8192, machine=Machine.of("h100", devices=number))
        for number in (1, 8)
    )
    assert sum(one.minutes.values()) == pytest.approx(8 * sum(eight.minutes.values()))
    small = estimate_scale(PAPER, corpus_tokens=484_000, num_tokens=8192, machine=Machine.of("l4", devices=8))
    assert any("This does not fit: a device has 24 GB" in note for note in small.notes)
    with pytest.raises(ValueError, match="`corpus_tokens` must be at least 1, got 0"):
        estimate_scale(PAPER, corpus_tokens=0, num_tokens=1)


def test_the_disk_is_what_a_run_takes(tmp_path: Path) -> None:
    args = runs.settings(num_conversations=40, conversations_per_chunk=20, recitation_share=0.0)
    runs.SelfStudySynthesizer(tiny_model(), tiny_tokenizer(), args).synthesize(runs.TEXT, tmp_path)
    taken = sum(path.stat().st_size for path in (tmp_path / "hidden_states").glob("*.arrow"))
    shape = ModelShape.of(tiny_model().config)
    estimate = estimate_scale(args, corpus_tokens=720, num_tokens=8, model=shape)
    assert 0.3 * taken < estimate.disk["teacher's targets (hidden_states)"] < taken


def test_the_command_computes_it_for_anyones_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate"]) == 0
    assert "65,536 conversations" in capsys.readouterr().out
    tiny_model().config.save_pretrained(tmp_path)
    assert main(["estimate", "--model", str(tmp_path), "--num-tokens", "64", "--devices", "1", "--epochs", "2"]) == 0
    assert "2 epoch(s), 4,096 steps" in capsys.readouterr().out
    assert main(["estimate", "--num-conversations", "0"]) == 1
    assert "`num_conversations` must be at least 1" in capsys.readouterr().err
