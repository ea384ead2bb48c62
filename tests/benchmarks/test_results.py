"""The evidence's command on a tiny model: cells are kept and resumed, and the page is written from the lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results, results_page
from peft_cartridges.evaluation.baselines import BASELINES
from tests.tiny_models import tiny_model, tiny_tokenizer

pytest.importorskip("matplotlib")

TEXT = " ".join(f"w{index}" for index in range(50, 120)) + " the old captain says yes . the new ship is red . " * 6
QUESTIONS = [{"question": f"what is w{index} ?", "answer": f"w{index} is red ."} for index in range(60, 68)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"id": f"qasper-{i}", "text": f"w{20 + i} {TEXT}", "questions": QUESTIONS} for i in range(2)]
    (data / "qasper.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    general = [{"prompt": "when ?", "answer": "seven days ."}, {"prompt": "is it new ?", "answer": "no ."}]
    (data / "general.jsonl").write_text("\n".join(map(json.dumps, general)), encoding="utf-8")
    monkeypatch.setattr(results, "OWN", ())
    return tmp_path


def _run(folder: Path, *options: str) -> tuple[str, dict[str, dict[str, Any]]]:
    argv = [
        "--model", str(folder / "model"), "--dtype", "float32", "--data", str(folder / "data"), "--tasks", "qasper",
        "--window", "4000", "--conversations", "8", "--steps", "2", "--questions", "3",
        "--output", str(folder / "out" / "lines.jsonl"), "--page", str(folder / "docs" / "page.md"), "--work",
        str(folder / "work"), *options,
    ]  # fmt: skip
    results.main(argv)
    return (folder / "docs" / "page.md").read_text(), results.read_records(folder / "out" / "lines.jsonl")


def test_cells_are_kept_and_the_page_is_written_from_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, records = _run(folder, "--budget", "small", "--only", "cost", "baselines")
    assert set(records) == {"cost/qasper-0", "baselines/qasper-0", "baselines/qasper-1"}
    assert "w60" not in json.dumps(records) and "captain" not in json.dumps(records)  # numbers, no text
    assert (
        "## Against what one would do instead" in page and "| BM25 passages |" in page
    ) or "bm25s is not installed" in page
    assert "- quality: 0 of 2 cells" in page and "not run" in page
    assert (folder / "docs" / "page" / "baselines.png").stat().st_size > 1000
    before = (folder / "out" / "lines.jsonl").read_text()
    capsys.readouterr()
    _run(folder, "--budget", "small", "--only", "cost", "baselines")  # nothing is left to do
    assert (folder / "out" / "lines.jsonl").read_text() == before
    with (folder / "out" / "lines.jsonl").open("a") as file:
        file.write('{"name": "cut short')
    again, records = _run(folder, "--page-only")
    assert len(records) == 3 and again.split("## The paper")[0].split("cells")[0] == page.split("cells")[0]


def test_a_stop_within_a_cell_loses_no_finished_method(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stops = iter([True, False, False])

    def interrupted(bench: Any) -> Any:
        if next(stops):
            raise KeyboardInterrupt
        return BASELINES["first_tokens"](bench)

    monkeypatch.setitem(BASELINES, "interrupted", interrupted)
    monkeypatch.setattr(results, "list_baselines", lambda: ["no_context", "full_text", "first_tokens", "interrupted"])
    _, records = _run(folder, "--only", "baselines")
    assert records == {}
    (partial,) = (folder / "work" / "partial").iterdir()
    assert list(results.read_records(partial)) == ["no_context", "full_text", "first_tokens"]
    _, records = _run(folder, "--only", "baselines")
    systems = records["baselines/qasper-0"]["report"]["systems"]
    assert [s["name"] for s in systems] == ["no context", "full text", "first tokens", "first tokens"]
    assert systems[2]["items"] == systems[3]["items"] and list((folder / "work" / "partial").iterdir()) == []


def test_a_trained_cell_its_variants_and_a_composition(folder: Path) -> None:
    page, records = _run(folder, "--budget", "full", "--only", "quality", "composition", "sink")
    trained = records["quality/qasper-0"]
    assert trained["steps"] == 2 and trained["conversations"] == 8 and trained["train_seconds"] > 0
    systems = {system["name"]: system for system in trained["report"]["systems"]}
    assert systems["cartridge"]["num_tokens"] == trained["num_tokens"]
    assert {"general_kl", "contamination", "instructions_followed", "abstention_separation"} <= set(
        systems["cartridge"]["metrics"]
    )
    assert records["sink/qasper-0/frozen=4"]["params"] == {"frozen": 4}
    joined = records["composition/qasper-0/other=qasper-1"]["report"]["systems"]
    assert [s["name"] for s in joined[2:]] == ["alone", "first of two", "second of two", "the other alone"]
    assert joined[3]["num_tokens"] == 2 * trained["num_tokens"] - 1
    # The cartridge of the base is trained once, and measured again from its file.
    alone = joined[2]["metrics"]["gold_nll"]["value"]
    assert alone == pytest.approx(systems["cartridge"]["metrics"]["gold_nll"]["value"], abs=1e-4)
    assert "## Composition" in page and "## Frozen first tokens" in page and "| two cartridges trained apart" in page


def test_verdicts_follow_the_intervals() -> None:
    def record(name: str, group: str, nll: float, **params: Any) -> dict[str, Any]:
        def system(kind: str, values: list[float]) -> dict[str, Any]:
            return {"name": kind, "num_tokens": 1, "items": {"gold_nll": {"values": values, "weights": [1.0] * 4}}}

        spread = [nll - 0.01, nll, nll, nll + 0.01]
        systems = [system("no context", [2.0] * 4), system("full text", [1.0] * 4), system("cartridge", spread)]
        report = {"systems": systems, "text_tokens": 100, "settings": {}, "versions": {}, "command": ""}
        return {"name": name, "group": group, "document": "d", "params": params, "report": report}

    worse, better = (
        results_page._claims(results_page.Results([
            record("a", "quality", ours), record("b", "objective", 1.5, loss_type="cross_entropy"),
            record("c", "sizes", ours, shrink=38), record("d", "sink", ours + 0.005, frozen=0),
        ])) for ours in (1.7, 1.02)
    )  # fmt: skip

    def verdict(page: str, claim: str) -> str:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {claim}")]
        return row.split("|")[-2].strip()

    assert verdict(better, "as good as the text") == "confirmed" and verdict(worse, "as good as") == "not confirmed"
    assert verdict(better, "KL is better") == "confirmed" and verdict(worse, "KL is better") == "not confirmed"
    assert verdict(better, "a frozen first token") == "not decidable: the intervals overlap"
    assert verdict(better, "five kinds") == "not run"


def test_the_plan_covers_what_the_page_shows() -> None:
    cells = results.plan(["a", "b", "c", "d"], ["e"])
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    groups = {cell.group for cell in cells}
    assert (
        set(results_page._VARIANTS) | {"composition", "parts", "long", "quality", "baselines", "cost", "lora"} <= groups
    )
    assert all(hasattr(results.Run, cell.kind) for cell in cells)
    assert {cell.budget for cell in cells if cell.group == "baselines"} == {"small"}
