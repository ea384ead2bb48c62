"""`cartridges evaluate`, as typed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_cartridges import KVPrefix
from peft_cartridges.cli import main
from peft_cartridges.hub.card_facts import load_facts
from tests.exactness import cartridge_model
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXT = "the old captain says yes . the new ship is red . " * 3


def _lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("evaluate")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    peft_model = cartridge_model(model, KVPrefix.from_text(model, tokenizer, TEXT)[:8])
    peft_model.save_pretrained(folder / "cartridge")
    (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
    questions = [
        {"question": "what is the ship ?", "answer": "red ."},
        {"question": "who ?", "answer": "the captain ."},
    ]
    return {
        "cartridge": str(folder / "cartridge"),
        "base": str(folder / "base"),
        "corpus": str(folder / "corpus.txt"),
        "questions": _lines(folder / "questions.jsonl", questions),
        "empty": _lines(folder / "empty.jsonl", [{"question": "what is the ship ?"}]),
        "general": _lines(folder / "general.jsonl", [{"prompt": "when ?", "answer": "seven days ."}]),
        "documents": _lines(folder / "documents.jsonl", [
            {"id": "a", "text": TEXT, "questions": questions}, {"id": "b", "text": "sea", "questions": questions[:1]},
        ]),
        "output": str(folder / "report.json"),
    }  # fmt: skip


def _run(files: dict[str, str], *options: str) -> int:
    return main([
        "evaluate", files["cartridge"], "--base-model", files["base"], "--answer-metrics", "token_f1", "--max-new-tokens",
        "2", "--no-speed", *options,
    ])  # fmt: skip


def test_figures_on_screen_in_a_file_and_on_the_card(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    on = ["--corpus", files["corpus"], "--questions", files["questions"], "--general", files["general"]]
    assert _run(files, *on, "--baselines", "summary", "--output", files["output"], "--card") == 0
    shown = capsys.readouterr().out
    assert "### On the text" in shown and "| summary |" in shown and "### Off the text" in shown
    record = json.loads(Path(files["output"]).read_text())
    names = [system["name"] for system in record["systems"]]
    assert names == ["no context", "full text", "cartridge", "summary"] and record["command"].startswith("cartridges ")
    assert record["settings"]["max_new_tokens"] == 2
    metrics = {metric.type for metric in load_facts(files["cartridge"]).metrics}
    assert {"gold_nll", "general_kl", "instructions_followed"} <= metrics
    assert "gold-answer NLL" in (Path(files["cartridge"]) / "README.md").read_text()


def test_a_document_of_a_task(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    on = ["--task", "documents", "--data", files["documents"], "--document", "a", "--general", "none"]
    assert _run(files, *on, "--no-generate") == 0
    shown = capsys.readouterr().out
    assert "| cartridge | 8 |" in shown and "tells them apart" in shown  # the other document's questions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--corpus", "{corpus}", "--questions", "{empty}"], "no question with a gold answer"),
        (["--corpus", "{corpus}", "--questions", "nowhere.jsonl"], "There is no file 'nowhere.jsonl'"),
        (["--corpus", "{corpus}"], "give --corpus and --questions, or --task"),
        (["--task", "longhealth"], "'longhealth' is not on the Hub: give a file"),
        (["--task", "documents", "--data", "{documents}", "--document", "c"], "has no 'c', but a, b"),
        (["--corpus", "{corpus}", "--questions", "{questions}", "--judge-url", "http://x"], "go together"),
        (["--corpus", "{corpus}", "--questions", "{questions}", "--baselines", "rag"], "'rag' is unknown"),
    ],
)
def test_errors_are_one_line(
    options: list[str], message: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(files, "--general", "none", *(option.format(**files) for option in options)) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("cartridges evaluate: error: ") and message in error


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        ("sacrebleu", ["--answer-metrics", "chrf"], "pip install 'peft-cartridges[eval]'"),
        ("rouge_score.rouge_scorer", ["--answer-metrics", "rouge_l"], "pip install 'peft-cartridges[eval]'"),
        ("matplotlib", ["--plot", "gap.png"], "pip install 'peft-cartridges[eval]'"),
        (
            "openai",
            ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "x"],
            "pip install 'peft-cartridges[openai]'",
        ),
    ],
)
def test_a_missing_extra_is_one_line_before_anything_is_measured(
    module: str,
    options: list[str],
    message: str,
    files: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    on = ["--corpus", files["corpus"], "--questions", files["questions"], "--general", "none"]
    assert _run(files, *on, *options) == 1
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1] and "no_context" not in error


def test_a_text_beyond_the_window_is_measured_without_what_needs_it(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.txt").write_text(TEXT * 60, encoding="utf-8")
    on = ["--corpus", str(tmp_path / "long.txt"), "--questions", files["questions"], "--general", "none"]
    assert _run(files, *on, "--no-generate", "--baselines", "summary", "bm25") == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("- Not measured: full text, summary")]
    assert "the model's window 512: it does not fit" in line
    assert "| cartridge | 8 |" in shown and "gap closed" not in shown
