"""Resuming, killed runs, and runs that diverge."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers.trainer_utils import get_last_checkpoint

from peft_cartridges.gate import GATE_FILE
from peft_cartridges.trainer.checkpoints import PARTIAL_DIR, TrainingDivergedError
from tests.tiny_models import tiny_model
from tests.trainer.small_runs import losses, make_conversations, make_trainer

FILES = {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"}


@pytest.fixture(scope="module")
def conversations() -> Dataset:
    return make_conversations(num_conversations=24)


# Seven steps over three passes of a shuffled order: the checkpoint is in the middle of a pass that is not the first.
RUN = {"max_steps": 7, "save_strategy": "steps", "save_steps": 5, "per_device_train_batch_size": 8}


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"on_policy_fraction": 0.4}, {"resample_every": 2}])
def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(tmp_path: Path, conversations: Dataset, options: dict) -> None:
    dataset = None if "resample_every" in options else conversations
    whole = make_trainer(tmp_path / "whole", dataset=dataset, **RUN, **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", dataset=dataset, **RUN, **options)
    torch.rand(100)  # another random state than the unbroken run has
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert len(losses(whole)) == 7
    assert losses(resumed) == losses(whole)
    for a, b in zip(whole.model.get_kv_prefix().keys, resumed.model.get_kv_prefix().keys, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "length",
    [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 1.4}, {"max_steps": -1, "num_train_epochs": 2.0}],
)
def test_a_finished_run_stays_as_it_is(tmp_path: Path, conversations: Dataset, length: dict) -> None:
    options = {**RUN, "save_steps": 1, "ema_decay": 0.5, "learning_rate": 0.01, **length}
    whole = make_trainer(tmp_path, dataset=conversations, **options)
    whole.train()
    files = {path: path.read_bytes() for path in tmp_path.rglob("checkpoint-*/*")}
    again = make_trainer(tmp_path, dataset=conversations, **{**options, "learning_rate": 0.03})
    output = again.train(resume_from_checkpoint=True)
    assert output.global_step == again.state.global_step == again.state.max_steps == whole.state.global_step
    assert losses(again) == losses(whole)
    for a, b in zip(whole.model.get_kv_prefix().values, again.model.get_kv_prefix().values, strict=True):
        assert torch.equal(a, b)
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("checkpoint-*/*")}


def test_a_finished_run_gives_its_best_cartridge_again(tmp_path: Path, conversations: Dataset) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
    options = {**RUN, **best, "save_steps": 1, "max_steps": 4, "save_total_limit": 2}
    whole, again = (
        make_trainer(tmp_path, dataset=conversations, arguments={"eval_dataset": conversations}, **options)
        for _ in range(2)
    )
    whole.train()
    assert whole.state.best_global_step < 4, "the one with the largest loss"
    again.train(resume_from_checkpoint=True)
    for a, b in zip(whole.model.get_kv_prefix().values, again.model.get_kv_prefix().values, strict=True):
        assert torch.equal(a, b)


def test_a_run_without_a_gate_takes_an_earlier_one_away(tmp_path: Path, conversations: Dataset) -> None:
    make_trainer(tmp_path, dataset=conversations).save_model()
    assert (tmp_path / GATE_FILE).is_file() and "gate" in json.loads((tmp_path / "cartridge.json").read_text())
    make_trainer(tmp_path, dataset=conversations, gate=False).save_model()
    assert not (tmp_path / GATE_FILE).exists() and "gate" not in json.loads((tmp_path / "cartridge.json").read_text())


@pytest.mark.parametrize("corpus", [True, False])
def test_a_run_is_not_carried_on_with_another_share(tmp_path: Path, conversations: Dataset, corpus: bool) -> None:
    dataset = None if corpus else conversations
    options = {**RUN, "save_steps": 1, "max_steps": 2}
    make_trainer(tmp_path, dataset=dataset, off_context_share=0.2, **options).train()
    other = make_trainer(tmp_path, dataset=dataset, off_context_share=0.1, **options)
    with pytest.raises(ValueError, match=r"another cartridge: off_context_share \(0.2 there, 0.1 now\)"):
        other.train(resume_from_checkpoint=True)


def test_a_new_run_does_not_begin_among_another_ones_checkpoints(tmp_path: Path, conversations: Dataset) -> None:
    make_trainer(tmp_path, dataset=conversations, **RUN).train()
    kept = (tmp_path / "_run.json").read_text()
    make_trainer(tmp_path, dataset=conversations, **RUN).train()  # the same, from the start
    other = make_trainer(tmp_path, dataset=conversations, loss_temperature=2.0, **RUN)
    with pytest.raises(ValueError, match=r"`output_dir` .* holds the run of another cartridge: loss_temperature"):
        other.train()
    assert other.state.global_step == 0 and (tmp_path / "_run.json").read_text() == kept


def test_the_order_of_later_passes_differs_from_the_first(tmp_path: Path, conversations: Dataset) -> None:
    sampler = make_trainer(tmp_path, dataset=conversations)._get_train_sampler()
    first = list(sampler)
    sampler.set_epoch(1)
    assert sorted(first) == sorted(sampler) == list(range(len(conversations))) and first != list(sampler)


def test_a_checkpoint_is_an_adapter_that_stock_calls_load(tmp_path: Path, conversations: Dataset) -> None:
    trainer = make_trainer(tmp_path, dataset=conversations, **{**RUN, "max_steps": 5})
    trainer.train()
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "checkpoint-5")
    assert torch.equal(model.get_kv_prefix().keys[1], trainer.model.get_kv_prefix().keys[1])


KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import Trainer
from tests.trainer.small_runs import make_conversations, make_trainer

victim, run = sys.argv[1], 0
original = getattr(Trainer, victim)

def dies_the_second_time(self, *args, **kwargs):
    global run
    run += 1
    if run == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)

setattr(Trainer, victim, dies_the_second_time)
make_trainer(
    Path(sys.argv[2]), dataset=make_conversations(), max_steps=4, save_strategy="steps", save_steps=2
).train()
"""


@pytest.mark.parametrize("victim", ["_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_killed_run_leaves_no_half_written_checkpoint(tmp_path: Path, victim: str) -> None:
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), victim, str(tmp_path)], capture_output=True, text=True
    )
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    assert (tmp_path / PARTIAL_DIR / "checkpoint-4").is_dir()  # it did die in the middle
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    assert {file.name for file in (tmp_path / "checkpoint-2").iterdir()} >= FILES
    trainer = make_trainer(tmp_path, dataset=make_conversations(), max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert {file.name for file in (tmp_path / "checkpoint-4").iterdir()} >= FILES
    assert not (tmp_path / PARTIAL_DIR).exists()


def test_old_checkpoints_go_and_the_best_one_stays(tmp_path: Path, conversations: Dataset) -> None:
    trainer = make_trainer(
        tmp_path, dataset=conversations, max_steps=4, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, save_total_limit=2, metric_for_best_model="loss", load_best_model_at_end=True,
        learning_rate=2.0, arguments={"eval_dataset": conversations.select(range(4))},
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.is_dir() and best.parent == tmp_path
    assert best.name == f"checkpoint-{trainer.state.best_global_step}"
    assert {path.name for path in tmp_path.glob("checkpoint-*")} <= {best.name, "checkpoint-3", "checkpoint-4"}
    state = (tmp_path / "checkpoint-4" / "trainer_state.json").read_text()
    assert PARTIAL_DIR not in state and best.name in state
    saved = PeftModel.from_pretrained(tiny_model(), best).get_kv_prefix()
    assert torch.equal(saved.values[0], trainer.model.get_kv_prefix().values[0])


def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path, conversations: Dataset) -> None:
    trainer = make_trainer(
        tmp_path, dataset=conversations, max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=1
    )
    compute = trainer.compute_loss

    def diverging(*args: object, **kwargs: object) -> torch.Tensor:
        return compute(*args, **kwargs) * (float("nan") if trainer.state.global_step == 3 else 1)

    trainer.compute_loss = diverging
    with pytest.raises(TrainingDivergedError, match=r"the loss is nan at step 4.*checkpoint-2.*lower `learning_rate`"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_an_absurd_learning_rate_is_caught(tmp_path: Path, conversations: Dataset) -> None:
    trainer = make_trainer(tmp_path, dataset=conversations, learning_rate=1e38, max_steps=8)
    with pytest.raises(TrainingDivergedError, match="There is no checkpoint yet: start again and a lower"):
        trainer.train()


def test_a_cartridge_of_nan_is_not_saved(tmp_path: Path, conversations: Dataset) -> None:
    trainer = make_trainer(tmp_path, dataset=conversations, max_steps=1, save_strategy="steps", save_steps=1)
    layer = trainer.model.base_model.cartridge_layers()[1]
    step = trainer.callback_handler.on_step_end

    def spoil(*args: object) -> object:
        with torch.no_grad():
            layer.kv_prefix_value["default"][0, 0, 0] = float("inf")
        return step(*args)

    trainer.callback_handler.on_step_end = spoil
    with pytest.raises(TrainingDivergedError, match=r"kv_prefix_value.* holds NaN or infinite values"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
