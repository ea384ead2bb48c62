"""The whole way as a user goes it: a corpus, a set, a cartridge, an answer; over the Hub, and over kill -9."""

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
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_cartridges import load_cartridge, load_self_study
from peft_cartridges.cli import main
from tests.hub.conftest import hub  # noqa: F401 (a fixture)
from tests.hub.local_hub import LocalHub
from tests.tiny_models import tiny_model
from tests.trainer.small_runs import TEXT, TOKENIZER

ROOT = Path(__file__).parents[2]
SYNTHESIS = [
    "--num-conversations", "64", "--conversations-per-chunk", "4", "--min-chunk-tokens", "30", "--max-chunk-tokens", "40",
    "--max-question-tokens", "6", "--max-answer-tokens", "8", "--quality-filters", "empty",
    "--off-context-share", "0.05",
]  # fmt: skip
TRAINING = [
    "--num-tokens", "8", "--use-cpu", "--steps", "30", "--save-steps", "3", "--logging-steps", "1", "--warmup-steps", "0",
    "--plot", "false",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "corpus.md").write_text(TEXT)
    return tmp_path


def _answer(model: torch.nn.Module, tokenizer: object) -> list[int]:
    chat = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        [{"role": "user", "content": "what is the sea ?"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    chat.pop("token_type_ids", None)
    found = model.generate(**chat, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    return found[0, chat["input_ids"].shape[1] :].tolist()


def test_from_a_corpus_over_the_hub_to_an_answer(hub: LocalHub, folder: Path) -> None:  # noqa: F811
    model = ["--model", str(folder / "model")]
    written = ["synthesize", str(folder / "corpus.md"), *model, "--output-dir", str(folder / "set"), *SYNTHESIS]
    assert main([*written, "--dtype", "float32", "--push-to-hub", "user/talks"]) == 0
    assert hub.repos["user/talks"].private
    out = str(folder / "out")
    assert main(["train", "--conversations", "user/talks", *model, "--output-dir", out, *TRAINING]) == 0
    facts = json.loads((folder / "out" / "cartridge.json").read_text())
    assert facts["num_conversations"] == 67 and facts["off_context_conversations"] == 3  # over the Hub and back
    assert facts["corpus_name"] == "corpus.md"
    assert main(["push", out, "user/cartridge", "--base-model", "org/base", "--private"]) == 0
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= set(hub.files("user/cartridge"))

    ours, tokenizer = load_cartridge("user/cartridge", base_model=folder / "model", dtype=torch.float32)
    answer = _answer(ours, tokenizer)
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    assert _answer(base, tokenizer) != answer
    assert _answer(PeftModel.from_pretrained(base, "user/cartridge"), AutoTokenizer.from_pretrained(out)) == answer


def _start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "peft_cartridges", "train", str(folder / "corpus.md"), "--model", str(folder / "model"),
        "--output-dir", str(folder / name), *SYNTHESIS, *TRAINING,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def test_a_run_that_is_killed_twice_gives_the_cartridge_of_one_that_is_not(folder: Path) -> None:
    assert _start(folder, "whole").wait(timeout=240) == 0, (folder / "whole.log").read_text()[-3000:]
    out = folder / "out"
    for wanted in ("_conversations/*/written/*.arrow", "checkpoint-*/adapter_model.safetensors"):
        process, deadline = _start(folder, "out"), time.monotonic() + 240
        while len(list(out.glob(wanted))) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was finished before it was killed"
        if wanted.startswith("_"):
            kept = {path: path.stat().st_mtime_ns for path in out.glob(wanted)}
            assert kept and not list(out.glob("checkpoint-*"))
    assert _start(folder, "out").wait(timeout=240) == 0, (folder / "out.log").read_text()[-3000:]
    assert "Carrying on at" in (folder / "out.log").read_text()
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    sets = [load_self_study(next((folder / name / "_conversations").iterdir())) for name in ("whole", "out")]
    assert sets[0]["messages"] == sets[1]["messages"]
    files = [load_file(folder / name / "adapter_model.safetensors") for name in ("whole", "out")]
    torch.testing.assert_close(files[1], files[0], atol=1e-5, rtol=1e-4)
