"""The evidence's command on a tiny model: cells are kept and resumed, and the page is written from the lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import __main__ as command
from benchmarks.results import claims, page, plan, records, run
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
    monkeypatch.setattr(plan, "OWN", ())
    return tmp_path


def _run(folder: Path, *options: str) -> tuple[str, dict[str, dict[str, Any]]]:
    argv = [
        "--model", str(folder / "model"), "--dtype", "float32", "--data", str(folder / "data"), "--tasks", "qasper",
        "--window", "4000", "--documents", "2", "--conversations", "8", "--steps", "2", "--questions", "3",
        "--new-tokens", "4",
        "--output", str(folder / "out" / "lines.jsonl"), "--page", str(folder / "docs" / "page.md"), "--work",
        str(folder / "work"), *options,
    ]  # fmt: skip
    command.main(argv)
    return (folder / "docs" / "page.md").read_text(), records.read_records(folder / "out" / "lines.jsonl")


def test_cells_are_kept_and_the_page_is_written_from_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, found = _run(folder, "--only", "cost", "baselines")
    assert set(found) == {"cost/qasper-0", "baselines/qasper-0", "baselines/qasper-1"}
    assert "w60" not in json.dumps(found) and "captain" not in json.dumps(found)  # numbers, no text
    assert "## Against what one would do instead" in written and "the model's own states |" in written
    assert (
        "- quality/qasper-0" in written.split("## Cells that were not run")[1] and "the small budget, 3 of" in written
    )
    for plot in ("baselines.png", "break_even.png"):
        assert (folder / "docs" / "page" / plot).stat().st_size > 1000
    what = [row[0] for row in found["cost/qasper-0"]["seconds_told_and_measured"]]
    assert what[:2] == ["writing conversations", "training"] and "a question, text in context in memory" in what
    assert all(told == measured for _, told, measured in found["cost/qasper-0"]["bytes_told_and_measured"])
    lines = folder / "out" / "lines.jsonl"
    before = lines.read_text()
    _run(folder, "--only", "cost", "baselines")  # nothing is left to do
    assert lines.read_text() == before
    with lines.open("a") as file:
        file.write('{"name": "cut short')
    again, found = _run(folder, "--page-only")
    assert len(found) == 3 and again == written
    # What was measured with other settings is measured anew, and is not on the page.
    other, found = _run(folder, "--steps", "3", "--page-only")
    assert ", 0 of " in other


def test_a_stop_within_a_cell_loses_no_finished_method(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stops = iter([True, False, False])

    def interrupted(bench: Any) -> Any:
        if next(stops):
            raise KeyboardInterrupt
        return BASELINES["first_tokens"](bench)

    monkeypatch.setitem(BASELINES, "interrupted", interrupted)
    monkeypatch.setattr(run, "list_baselines", lambda: ["no_context", "full_text", "first_tokens", "interrupted"])
    monkeypatch.setattr(run, "git_commit", lambda: "old")
    _, found = _run(folder, "--only", "baselines")
    assert found == {}
    (spent,) = folder.glob("work/*/spent/*")
    assert 0 < json.loads(spent.read_text()) < 1000
    spent.write_text("1000")
    monkeypatch.setattr(run, "git_commit", lambda: "new")
    (partial,) = folder.glob("work/*/partial/*")
    (references,) = folder.glob("work/*/references/*")
    assert list(records.read_records(partial)) == ["first_tokens"]
    assert list(records.read_records(references)) == ["no_context", "full_text"]
    written, found = _run(folder, "--only", "baselines")
    carried_on, whole = found["baselines/qasper-0"], found["baselines/qasper-1"]
    assert carried_on["seconds"] > 1000 > whole["seconds"] and not spent.exists()  # with what the first half took
    assert (carried_on["commit"], carried_on["made_at"], whole["made_at"]) == ("new", ["old"], [])
    assert "at commit `new` (some of what they measure was made at `old`)" in written
    systems = found["baselines/qasper-0"]["report"]["systems"]
    assert [s["name"] for s in systems] == ["no context", "full text", "first tokens", "first tokens"]
    assert systems[2]["items"] == systems[3]["items"] and list(folder.glob("work/*/partial/*")) == []


def test_trained_cells_their_variants_and_compositions(folder: Path) -> None:
    written, found = _run(folder, "--only", "quality", "composition", "sink", "parts", "seconds", "lora")
    trained = found["quality/qasper-0"]
    assert trained["steps"] == 2 and trained["conversations"] == 9 and trained["train_seconds"] > 0  # 8 about the text
    systems = {system["name"]: system for system in trained["report"]["systems"]}
    assert systems["cartridge"]["num_tokens"] == trained["num_tokens"]
    assert {"general_kl", "contamination", "instructions_followed", "abstention_separation"} <= set(
        systems["cartridge"]["metrics"]
    )
    assert found["sink/qasper-0/frozen=0"]["params"] == {"frozen": 0}
    assert found["seconds/qasper-0/share=0.5"]["steps"] == 1
    joined = found["composition/qasper-0/others=qasper-1"]["report"]["systems"]
    assert [s["name"] for s in joined[2:]] == ["alone", "another alone", "first of two", "last of two"]
    assert joined[4]["num_tokens"] == joined[2]["num_tokens"] + joined[3]["num_tokens"] - 1
    # The cartridge of the base is trained once, and measured again from its file, which says what commit made it.
    (kept,) = folder.glob("work/*/qasper-0-recitation_share=0.5-shrink=10.json")
    assert json.loads(kept.read_text())["made_at"] == [trained["commit"]] and trained["made_at"] == []
    alone = joined[2]["metrics"]["gold_nll"]["value"]
    assert alone == pytest.approx(systems["cartridge"]["metrics"]["gold_nll"]["value"], abs=1e-4)
    halves = found["parts/qasper-0/parts=2"]["report"]["systems"][2]
    assert halves["name"] == "2 parts" and abs(halves["num_tokens"] - trained["num_tokens"]) <= 2
    for title in ("Composition", "Frozen first tokens", "One text in parts", "Off the text"):
        assert f"## {title}\n" in written
    assert "| LoRA of equal bytes |" in written and "| composed without training" in written


def test_fresh_makes_anew_what_is_asked_for_and_touches_nothing_else(folder: Path) -> None:
    _run(folder, "--only", "cost", "baselines")
    lines = folder / "out" / "lines.jsonl"
    (folder / "work" / "thesis.txt").write_text("somebody's own")
    (folder / "work" / "notes").mkdir()
    before = records.read_records(lines)
    other = {**before["cost/qasper-0"], "settings": {"steps": 3}}
    rows = [{**record, "commit": "old"} for record in [other, *before.values()]]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    others = folder / "work" / "01234567" / "partial"  # of other settings
    others.mkdir(parents=True)
    _, found = _run(folder, "--only", "cost", "--fresh")
    assert [name for name, record in found.items() if record["commit"] != "old"] == ["cost/qasper-0"]
    assert lines.read_text().startswith(json.dumps(rows[0])) and others.exists()
    assert (
        set(found) == set(before) and (folder / "work" / "thesis.txt").exists() and (folder / "work" / "notes").exists()
    )
    with pytest.raises(SystemExit):
        _run(folder, "--fresh", "--page-only")


def _record(name: str, group: str, nll: float, document: str = "d", count: int = 4, **params: Any) -> dict[str, Any]:
    def system(kind: str, values: list[float]) -> dict[str, Any]:
        return {"name": kind, "num_tokens": 1, "items": {"gold_nll": {"values": values, "weights": [1.0] * count}}}

    spread = [nll + 0.2 * (i % 2) for i in range(count)]
    systems = [system("no context", [2.0] * count), system("full text", [1.0] * count), system("cartridge", spread)]
    report = {"systems": systems, "text_tokens": 100, "settings": {}, "versions": {}, "command": ""}
    return {"name": name, "group": group, "document": document, "params": params, "report": report}


def test_verdicts_follow_the_intervals() -> None:
    def verdicts(ours: float) -> dict[str, str]:
        results = records.Results([
            _record("a", "quality", ours), _record("b", "objective", 1.5, loss_type="cross_entropy"),
            _record("c", "sizes", ours, shrink=38), _record("d", "sink", ours, frozen=0),
        ])  # fmt: skip
        return {claim.claim: claim.verdict for claim in claims.find_claims(results)}

    better, worse = verdicts(0.8), verdicts(1.7)

    def verdict(found: dict[str, str], claim: str) -> str:
        (only,) = [value for name, value in found.items() if name.startswith(claim)]
        return only

    assert verdict(better, "as good as the text") == "confirmed" and verdict(worse, "as good as") == "not confirmed"
    # The questions differ by more than the two systems do: pair by pair the difference is plain.
    assert verdict(better, "distillation") == "confirmed" and verdict(worse, "distillation") == "not confirmed"
    assert verdict(better, "a frozen first token") == "not decidable here"
    assert verdict(better, "five kinds") == "not run"


def test_figures_over_documents_by_hand() -> None:
    one, two = _record("a", "quality", 1.2, "one"), _record("b", "quality", 1.6, "two", count=8)
    results = records.Results([one, two, _record("c", "sink", 1.4, "two", count=8, frozen=0)])
    # Of each document: (2 - mean of x and x + 0.2) / (2 - 1); then their mean, however many questions each has.
    figure = results.figure([one, two], "cartridge", "gap_closed")
    assert figure is not None and figure.value == pytest.approx(((2 - 1.3) + (2 - 1.7)) / 2) and figure.n == 12
    assert figure.low < figure.value < figure.high
    difference = results.difference([one, two], results.of("sink"), ("cartridge", "cartridge"), "gap_closed")
    assert difference is not None and difference.value == pytest.approx(-0.2) and difference.n == 8
    assert difference.low == pytest.approx(-0.2) == difference.high  # on each question the same
    many = [_record(f"m{i}", "quality", 1.0 + 0.1 * i, f"d{i}") for i in range(6)]
    over = records.Results(many).figure(many, "cartridge", "gap_closed")
    assert over is not None and over.value == pytest.approx(2 - 1.1 - 0.25)
    assert results.figure([one], "LoRA", "gap_closed") is None


@pytest.mark.parametrize("budget", list(plan.BUDGETS))
def test_the_plan_covers_what_the_page_shows(budget: str) -> None:
    cells = plan.plan(["a", "b", "c", "d", "e", "f", "g", "h"], ["long"], budget)
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    groups = {cell.group for cell in cells}
    shown = {"composition", "parts", "long", "quality", "sizes", "seconds", "baselines", "presses", "cost", "lora"}
    assert groups == set(page._VARIANTS) | shown
    assert all(hasattr(run.Run, cell.kind) for cell in cells)
