"""`cartridges cost`, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_cartridges.cli import main
from tests.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cost")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_tables_figures_and_a_plot(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    options = [
        "--text-tokens",
        "4000",
        "--num-tokens",
        "100",
        "400",
        "--traffic-answer-tokens",
        "20",
        "--machine",
        "l4",
    ]
    files = ["--output", str(tmp_path / "cost.json"), "--plot", str(tmp_path / "cost.png")]
    assert main(["cost", "--model", base, *options, *files]) == 0
    shown = capsys.readouterr().out
    assert "Cartridge of 100 tokens" in shown and "Cartridge of 400 tokens" in shown and "| text in context |" in shown
    record = json.loads((tmp_path / "cost.json").read_text())
    assert record["traffic"]["answer_tokens"] == 20 and record["machine"]["flops"] == pytest.approx(0.4 * 121e12)
    assert record["costs"]["400"][0]["kv_bytes"] == 4 * record["costs"]["100"][0]["kv_bytes"]
    assert (tmp_path / "cost.png").stat().st_size > 1000


def test_a_text_and_a_measured_machine(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("the sea is blue . " * 20)
    assert (
        main(["cost", "--model", base, "--corpus", str(tmp_path / "text.txt"), "--num-tokens", "8", "--measure"]) == 0
    )
    shown = capsys.readouterr().out
    assert "text of 102 tokens" in shown and "this machine, measured" in shown


def test_every_setting_is_explained(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cost", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--traffic-hit-rate" in shown and "With prefix caching, the share of questions" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --text-tokens and --corpus"),
        (["--text-tokens", "100", "--flops", "1e12"], "--flops and --bandwidth go together"),
        (["--text-tokens", "100"], "`num_tokens` (512) must be at least 1 and less than `text_tokens` (100)"),
        (["--text-tokens", "1000", "--utilization", "2"], "`utilization` must be above 0"),
    ],
)
def test_errors_are_one_line(base: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "--model", base, *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("cartridges cost: error: ") and message in error


def test_a_model_that_is_nowhere_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "--model", "no-such-model", "--text-tokens", "1000"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("cartridges cost: error: ") and said.count("\n") == 1
