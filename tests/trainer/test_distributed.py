"""Several processes on one machine (gloo), through the command as a user would start it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_models import tiny_model
from tests.trainer.scripts.sharded_run import prepare
from tests.trainer.small_runs import GOLD, TEXT, TOKENIZER

ROOT = Path(__file__).parents[2]
LAUNCH = ["-m", "accelerate.commands.launch"]
DEEPSPEED = Path(sys.prefix) / "deepspeed"  # apart, as the Makefile installs it: accelerate imports what it finds
TWO_PROCESSES = [*LAUNCH, "--config_file", "examples/configs/accelerate_ddp_cpu.yaml"]
SETTINGS = [
    # With 8 general conversations a pass is 24 rows, whole steps of 8: accelerate fills a step up that is short.
    "--num_tokens", "8", "--num_conversations", "16", "--off_context_share", "0.3333", "--conversations_per_chunk", "4", "--min_chunk_tokens", "30",
    "--max_chunk_tokens", "40", "--max_question_tokens", "6", "--max_answer_tokens", "8", "--quality_filters", "empty",
    "--num_eval_conversations", "4", "--use_cpu", "--max_steps", "30", "--logging_steps", "1", "--warmup_steps", "0",
    "--save_strategy", "steps", "--save_steps", "3", "--disable_tqdm", "true", "--plot", "false",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    tiny_model().save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    (folder / "corpus.txt").write_text(TEXT)
    (folder / "gold.jsonl").write_text("\n".join(map(json.dumps, GOLD)))
    return folder


def _start(
    launcher: list[str], folder: Path, name: str, *options: str, search: Path | None = None
) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, *launcher, "-m", "peft_cartridges", "train", str(folder / "corpus.txt"),
        "--model", str(folder / "model"), "--gold_questions", str(folder / "gold.jsonl"),
        "--output_dir", str(folder / name), *SETTINGS, *options,
    ]  # fmt: skip
    log = (folder / f"{name}.log").open("ab")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, (ROOT, search))))
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def _finish(process: subprocess.Popen[bytes], folder: Path, name: str) -> tuple[list[float], dict[str, float]]:
    assert process.wait(timeout=240) == 0, (folder / f"{name}.log").read_text()[-3000:]
    state = json.loads((folder / name / "checkpoint-30" / "trainer_state.json").read_text())
    metrics = json.loads((folder / name / "eval_results.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry], metrics


@pytest.fixture(scope="module")
def one_process(folder: Path) -> tuple[list[float], dict[str, float]]:
    return _finish(_start([], folder, "one", "--per_device_train_batch_size", "8"), folder, "one")


def test_two_processes_killed_and_resumed_give_the_losses_of_one(
    folder: Path, one_process: tuple[list[float], dict[str, float]]
) -> None:
    expected, metrics = one_process
    options = ("--per_device_train_batch_size", "4")
    process = _start(TWO_PROCESSES, folder, "two", *options)
    deadline = time.monotonic() + 240
    while not (folder / "two" / "checkpoint-6").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "two" / "checkpoint-30").exists(), "it was finished before it was killed"
    losses, resumed = _finish(_start(TWO_PROCESSES, folder, "two", *options), folder, "two")
    assert len(losses) == 30
    assert losses == pytest.approx(expected, rel=1e-4)
    for name in ("eval_loss", "eval_gold_nll", "eval_conversation_gap_closed"):
        assert resumed[name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-3), name
    assert (folder / "two" / "README.md").read_text().count("corpus.txt") and "captain" not in "".join(
        path.read_text() for path in (folder / "two").glob("*.md")
    )


def test_the_flags_in_the_docs_start_two_processes(folder: Path) -> None:
    options = ("--per_device_train_batch_size", "4", "--max_steps", "3")
    process = _start([*LAUNCH, "--multi_gpu", "--num_processes", "2"], folder, "flags", *options)
    assert process.wait(timeout=240) == 0, (folder / "flags.log").read_text()[-3000:]
    # 24 conversations, 4 at a time on each: one process would have passed over half of them.
    state = json.loads((folder / "flags" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["epoch"] == 1.0


def test_deepspeed_gives_the_losses_of_one(
    folder: Path, one_process: tuple[list[float], dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    search = DEEPSPEED if DEEPSPEED.exists() else None
    if search is None:
        pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launcher = [*LAUNCH, "--config_file", "examples/configs/accelerate_deepspeed_zero2.yaml", "--num_processes", "2"]
    process = _start(launcher, folder, "deepspeed", "--per_device_train_batch_size", "4", search=search)
    losses, metrics = _finish(process, folder, "deepspeed")
    states = [path.name for path in (folder / "deepspeed" / "checkpoint-30").glob("global_step30/*optim_states.pt")]
    assert len(states) == 2, "the optimizer's states were not split, so this was not ZeRO"
    assert losses == pytest.approx(one_process[0], rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx(one_process[1]["eval_loss"], rel=1e-3)


def test_steps_on_a_sharded_model_are_those_of_the_whole() -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = "tests/trainer/scripts/sharded_steps.py"
    result = subprocess.run(
        [sys.executable, *command, script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("sharded steps agree") == 2


def test_a_model_split_over_processes_is_trained_as_the_whole_one(tmp_path: Path) -> None:
    size = prepare(tmp_path / "model")
    script = ["tests/trainer/scripts/sharded_run.py", str(tmp_path)]
    # The C library otherwise keeps what was freed, which is then counted as memory in use.
    freeing = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **freeing}
    found = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        result = subprocess.run(
            [sys.executable, *launcher, *script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
        )
        assert result.returncode == 0, result.stderr[-3000:]
        found.append([json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"losses"')])
    ((whole,), shares) = found
    assert len(shares) == 2
    one, *two = (f"{run['weights'] / 1e6:.0f} and {run['others'] / 1e6:.0f} MB" for run in (whole, *shares))
    print(f"Weights, and the most of anything else, in one process: {one}; in two: {', '.join(two)}")
    # The weights were never whole in one of the two: neither loaded, nor looked at, trained, evaluated or saved.
    assert whole["weights"] >= size
    assert all(share["weights"] + share["others"] < size for share in shares)
    for share in shares:
        for name in ("losses", "kl", "gold"):
            assert share[name] == pytest.approx(whole[name], rel=1e-4), name
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("of-1", "of-2", "of-2/checkpoint-2")]
    torch.testing.assert_close(files[0], files[1], atol=1e-4, rtol=1e-4)
    assert set(files[2]) == set(files[0])
    cards = [json.loads((tmp_path / name / "cartridge.json").read_text()) for name in ("of-1", "of-2")]
    assert cards[0]["base_identity"]["weights_sha256"] == cards[1]["base_identity"]["weights_sha256"]
