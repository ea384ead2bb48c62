"""The whole way with a real vLLM as engine, in this process and as a server: a corpus, a set, a cartridge, an answer."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed (it needs an environment of its own: make test-vllm)")

from peft_cartridges import load_cartridge, load_self_study
from peft_cartridges.cli import main
from peft_cartridges.conversations import read_report
from tests.serving.models import save_base
from tests.trainer.small_runs import TEXT

# Greedy, so that every engine writes the same.
SYNTHESIS = [
    "--num-conversations", "8", "--conversations-per-chunk", "4", "--min-chunk-tokens", "30", "--max-chunk-tokens", "40",
    "--max-question-tokens", "6", "--max-answer-tokens", "8", "--quality-filters", "empty", "--question-temperature", "0",
    "--answer-temperature", "0", "--recitation-share", "0.25",
]  # fmt: skip
TRAINING = [
    "--num-tokens", "8", "--use-cpu", "--steps", "4", "--logging-steps", "1", "--warmup-steps", "0", "--plot", "false",
    "--per-device-train-batch-size", "4", "--dtype", "float32",
]  # fmt: skip
IN_PROCESS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    folder = tmp_path_factory.mktemp("vllm-runs")
    save_base(folder / "base")
    (folder / "corpus.md").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def by_transformers(folder: Path) -> Path:
    return _train(folder, "transformers")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """The address of a stock `vllm serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` starts; that command itself does not run from the wheel for CPUs, which has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "base")]
    options = [
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512",
    ]  # fmt: skip
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *options], stdout=output, stderr=output, start_new_session=True, cwd=folder
        )
    try:
        end = time.monotonic() + 300
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")[-4000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _train(folder: Path, name: str, *options: str, corpus: bool = True) -> Path:
    texts = [str(folder / "corpus.md"), *SYNTHESIS] if corpus else []
    place = ["--model", str(folder / "base"), "--output-dir", str(folder / name)]
    assert main(["train", *texts, *place, *TRAINING, *options]) == 0
    return folder / name


def _answer(out: Path, base: Path) -> list[int]:
    model, tokenizer = load_cartridge(out, base_model=base, dtype=torch.float32)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is the sea ?"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    ids = chat["input_ids"]
    found = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    return found[0, ids.shape[1] :].tolist()


def _losses(out: Path) -> list[float]:
    history = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def _check_same_run(folder: Path, out: Path, expected: Path, engine: str) -> None:
    """The same conversations, which this engine wrote, the same losses, and a cartridge that answers alike."""
    sets = [load_self_study(next((one / "_conversations").iterdir())) for one in (out, expected)]
    assert sets[0]["messages"] == sets[1]["messages"] and len(sets[0]) > 4
    assert read_report(sets[0])["synthesis"]["engine"] == engine
    assert _losses(out) == pytest.approx(_losses(expected), rel=1e-3)
    assert _answer(out, folder / "base") == _answer(expected, folder / "base")


def test_the_trainer_has_vllm_write_in_its_process(folder: Path, by_transformers: Path) -> None:
    out = _train(folder, "colocate", "--use-vllm", "--engine-options", json.dumps(IN_PROCESS))
    _check_same_run(folder, out, by_transformers, "vllm")


def test_the_trainer_has_a_server_write(folder: Path, server: str, by_transformers: Path) -> None:
    out = _train(folder, "server", "--use-vllm", "--vllm-mode", "server", "--vllm-server-base-url", server)
    _check_same_run(folder, out, by_transformers, "openai")


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_vllm_writes_every_round(folder: Path, mode: str, request: pytest.FixtureRequest) -> None:
    options = ["--engine-options", json.dumps(IN_PROCESS)]
    if mode == "server":
        options = ["--vllm-mode", mode, "--vllm-server-base-url", request.getfixturevalue("server")]
    out = _train(folder, f"rounds-{mode}", "--use-vllm", *options, "--resample-every", "2", "--answer-temperature", "1")
    assert not list((out / "_conversations").iterdir())  # each is dropped when it has been used
    assert len(_losses(out)) == 4 and len(_answer(out, folder / "base")) == 6


@pytest.mark.parametrize("engine", ["vllm", "openai"])
def test_from_a_corpus_to_an_answer(folder: Path, engine: str, request: pytest.FixtureRequest) -> None:
    place = ["--model", str(folder / "base"), "--output-dir", str(folder / f"set-{engine}")]
    options: list[Any] = ["--engine-options", json.dumps(IN_PROCESS)]
    if engine == "openai":
        options = ["--base-url", request.getfixturevalue("server")]
    corpus = str(folder / "corpus.md")
    assert main(["synthesize", corpus, *place, *SYNTHESIS, "--engine", engine, *options]) == 0
    written = load_self_study(folder / f"set-{engine}")
    assert len(written) > 4 and read_report(written)["synthesis"]["engine"] == engine
    out = _train(folder, f"of-set-{engine}", "--conversations", str(folder / f"set-{engine}"), corpus=False)
    assert len(_losses(out)) == 4 and len(_answer(out, folder / "base")) == 6
