"""The benchmarks run, with a tiny model: what they print and write, not what they measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import capacity
from tests.tiny_models import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "train_step": ["--num-tokens", "8", "--batch-size", "2", "--length", "8", "--steps", "1"],
    "decode": [
        *["--num-tokens", "8", "--context-tokens", "16", "--batch-sizes", "2", "--steps", "2", "--repeats", "1"],
        *["--systems", "ours", "text_per_row"],
    ],
}  # fmt: skip


def _run(name: str, folder: Path, options: list[str]) -> tuple[str, dict[str, Any]]:
    """What a benchmark of a tiny model prints, and the record that it writes."""
    model = tiny_model()
    model.resize_token_embeddings(10_000)  # the benchmarks draw ids of a vocabulary of ordinary size
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    output = folder / "figures.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--model", str(folder / "model"), "--rounds", "1"]
    done = subprocess.run(
        [*command, "--threads", "1", "--output", str(output), *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(output.read_text())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_prints_a_table_and_writes_its_figures(name: str, tmp_path: Path) -> None:
    printed, record = _run(name, tmp_path, COMMANDS[name])
    assert printed.startswith("| ")
    (measured,) = record["results"].values()
    assert all("error" not in result for results in measured.values() for result in results), measured
    assert record["command"].startswith(f"python -m benchmarks.{name}")


def test_capacity_reports_the_largest_batch(tmp_path: Path) -> None:
    options = ["--num-tokens", "8", "--systems", "ours", "--largest", "1", "--steps", "1"]
    printed, record = _run("capacity", tmp_path, options)
    assert record["results"]["largest"] == {"ours": 1}
    assert record["results"]["tried"]["ours"]["1"] > 0
    assert printed.startswith("| ") and "ours" in printed


def test_capacity_finds_the_largest_batch_of_a_budget() -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= 100

    assert 90 <= capacity._largest(fits, 4096) <= 100
    assert len(asked) < 15
    assert capacity._largest(fits, 64) == 64
    assert capacity._largest(lambda size: size <= 3, 64) == 3
    assert capacity._largest(lambda size: False, 64) == 0


def test_initialization_measures_strategies_on_documents(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    text = " ".join(f"the captain says w{number} ." for number in range(50, 80))
    document = {"id": "ship", "text": text, "questions": [{"question": "what says the captain", "answer": "w50"}]}
    (tmp_path / "texts.jsonl").write_text(json.dumps(document) + "\n")
    command = [sys.executable, "-m", "benchmarks.initialization", f"{tmp_path / 'texts.jsonl'}:ship"]
    command += ["--strategies", "first_tokens", "attention_matching share_of_queries=0.5", "--quantize", "fp8"]
    command += ["--model", str(tmp_path / "model"), "--dtype", "float32", "--output", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert [record["stored"] for record in records] == ["as it is", "fp8"] * 2
    assert records[1]["bytes"] < records[0]["bytes"] and records[0]["nll"] != records[2]["nll"]
    assert "| attention_matching share_of_queries=0.5" in done.stdout.replace("|  ", "| ").replace("  ", " ")
