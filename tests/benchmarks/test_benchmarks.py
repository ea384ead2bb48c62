"""The benchmarks run, with a tiny model: what they print and write, not what they measure."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import capacity, choosing
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


def test_the_gate_benchmark_measures_every_method_and_carries_on(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name in ("qasper", "quality", "toefl", "loogle"):
        rows = [
            {
                "id": f"{name}-{number}",
                "text": " ".join(f"the captain of {name} says w{word} ." for word in range(50 + number, 80)),
                "questions": [{"question": f"what says the captain of {name} , w{60 + number} ?", "answer": "w50"}],
            }
            for number in range(2)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": "write a haiku", "answer": "yes ."}, {"prompt": "add 3 and 4", "answer": "seven ."}]
    (tmp_path / "general.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command = [sys.executable, "-m", "benchmarks.gate", str(tmp_path), "--documents", "qasper-0", "toefl-1"]
    command += ["--model", str(tmp_path / "model"), "--dtype", "float32", "--general-kl", "2", "--conversations", "0"]
    command += ["--layers", "1", "2", "--output", str(tmp_path / "gate.jsonl")]
    for _ in range(2):  # the second time, nothing is left to do
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        records = [json.loads(line) for line in (tmp_path / "gate.jsonl").read_text().splitlines()]
        assert [record["document"] for record in records] == ["qasper-0", "toefl-1"]
    methods = {"words", "states-1", "states-2", "first_token_kl", "entropy", "likelihood"}
    for record in records:
        assert set(record["methods"]) == methods
        assert (
            record["methods"]["words"]["accepted"]["own"] == 1.0 and record["methods"]["words"]["auc"]["general"] == 1.0
        )
        kl = record["general_kl"]
        assert kl["gated"] == 0.0 == kl["accepted"] and kl["cartridge"] > 0 < kl["full_text"]
    assert " words |" in done.stdout and "gate : full text" in done.stdout


def test_choosing_leaves_out_only_what_was_measured_alike(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.max_position_embeddings = 4096  # that the trainer's own lengths fit
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    text = " ".join(f"the captain says w{number} . the new ship is red ." for number in range(50, 110))
    row = {"id": "qasper-0", "text": text, "questions": [{"question": "what says the captain ?", "answer": "w50"}]}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "general.jsonl").write_text(json.dumps({"prompt": "is it new ?", "answer": "no ."}) + "\n")
    lines = tmp_path / "lines.jsonl"
    common = [sys.executable, "-m", "benchmarks.choosing", "--output", str(lines)]
    command = [*common, "qasper-0", "--data", str(tmp_path), "--model", str(tmp_path / "model"), "--dtype", "float32"]
    command += ["--device", "cpu", "--work", str(tmp_path / "work")]
    command += ["--run", "num_conversations=8", "max_steps=2", "max_answer_tokens=8", "initialization=first_tokens"]
    for options, number in (([], 1), ([], 1), (["--held-out", "2"], 2)):
        done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(lines.read_text().splitlines()) == number
    first, second = map(json.loads, lines.read_text().splitlines())
    assert first["synthesis_seconds"] == second["synthesis_seconds"] > 0, "written once, told with both"
    assert first["commit"] and first["conversations_closed"] is None is not second["conversations_closed"]
    given: dict[str, Any] = {"model": "a/model", "dtype": "float32", "device": "cpu", "fits": 7000, "held_out": 0}
    assert choosing._is_alike(first, Namespace(**given, quantize=[]))
    assert not choosing._is_alike(first, Namespace(**given, quantize=["int8"]))
    assert not choosing._is_alike(first, Namespace(**given | {"device": "cuda"}, quantize=[]))
    drawn = subprocess.run([*common, "--table", "--plot", str(tmp_path / "plot.png")], cwd=ROOT, capture_output=True)
    assert drawn.returncode == 0 and b"| qasper-0 |" in drawn.stdout.replace(b"  ", b" ").replace(b"|  ", b"| ")
    assert (tmp_path / "plot.png").stat().st_size > 1000
