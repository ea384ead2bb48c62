"""`cartridges synthesize`, as typed."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from peft_cartridges import SynthesisConfig, load_self_study
from peft_cartridges.cli import main
from peft_cartridges.conversations import read_provenance, read_report
from peft_cartridges.model_identity import model_fingerprint
from tests.hub.conftest import hub  # noqa: F401 (a fixture)
from tests.hub.local_hub import LocalHub
from tests.self_study import runs
from tests.tiny_models import tiny_model, tiny_tokenizer

SMALL = [
    "--num-conversations", "6", "--conversations-per-chunk", "3", "--min-chunk-tokens", "30", "--max-chunk-tokens",
    "40", "--max-question-tokens", "6", "--max-answer-tokens", "8", "--off-context-share", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture()
def corpus(tmp_path: Path) -> str:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "log.md").write_text(runs.TEXT)
    return str(tmp_path / "corpus")


def test_a_run_is_made_and_carried_on(
    model: str, corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["synthesize", corpus, "--model", model, "--output-dir", str(tmp_path / "out"), *SMALL]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "6 conversations kept of" in shown and "log.md: " in shown and "load_self_study(" in shown
    assert "Chunks by what was kept of them: all 2," in shown
    shards = _shards(tmp_path / "out")
    assert len(shards) == 8
    assert main(command) == 0
    assert _shards(tmp_path / "out") == shards
    told = json.loads((tmp_path / "out" / "self_study.json").read_text())
    assert [row["document"] for row in told["report"]["per_chunk"]] == ["log.md"] * 2
    assert told["report"]["kept"] == 6 and told["corpus"]["name"] == "log.md" and told["base_model"] == Path(model).name
    assert len(load_self_study(tmp_path / "out")) == 6
    assert main([*command, "--num-conversations", "9"]) == 0
    assert shards.items() <= _shards(tmp_path / "out").items() and len(load_self_study(tmp_path / "out")) == 9
    assert main([*command, "--synthesis-seed", "7"]) == 1
    assert "cartridges synthesize: error: `output_dir` " in capsys.readouterr().err


def _shards(folder: Path, *stages: str) -> dict[Path, int]:
    stages = stages or ("written", "hidden_states")
    return {path: path.stat().st_mtime_ns for stage in stages for path in (folder / stage).iterdir()}


def test_a_preview_shows_conversations_and_the_time(
    model: str, corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["synthesize", corpus, "--model", model, "--preview", "3", *SMALL, "--recitation-share", "0"]) == 0
    shown = capsys.readouterr().out
    assert "\n1. " in shown and "\n3. " in shown and "\n4. " not in shown
    assert shown.count("A: ") == shown.count("B: ") == 3
    assert "tokens/s here: the run would take at most about" in shown


def test_an_estimate_needs_no_weights(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().config.save_pretrained(tmp_path / "config")
    tiny_tokenizer().save_pretrained(tmp_path / "config")
    assert main(["synthesize", corpus, "--model", str(tmp_path / "config"), "--estimate", *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "6 conversations (3 of them recitations) about 2 chunks" in shown and "targets take" in shown


def test_every_setting_is_an_option(
    model: str, corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["synthesize", "--help"])
    shown = capsys.readouterr().out
    for field in fields(SynthesisConfig):
        assert f"--{field.name.replace('_', '-')}" in shown
    command = [
        "synthesize", corpus, "--model", model, "--output-dir", str(tmp_path / "out"), *SMALL, "--chunking", "auto",
        "--seed-types", "question", "creative", "--no-refill-finished-rows", "--quality-filters", "--teacher-targets",
        "top_k", "--teacher-top-k", "4", "--system-prompts", "the captain says", "--chat-template-kwargs", '{"x": 1}',
    ]  # fmt: skip
    assert main(command) == 0
    told = json.loads((tmp_path / "out" / "self_study.json").read_text())["synthesis"]
    expected = SynthesisConfig(
        num_conversations=6, conversations_per_chunk=3, min_chunk_tokens=30, max_chunk_tokens=40,
        max_question_tokens=6, max_answer_tokens=8, chunking="auto", seed_types=["question", "creative"],
        refill_finished_rows=False, quality_filters=[], teacher_targets="top_k", teacher_top_k=4,
        system_prompts=["the captain says"], chat_template_kwargs='{"x": 1}', off_context_share=0.0,
    )  # fmt: skip
    public = {name: value for name, value in vars(expected).items() if name not in ("engine_options", "base_url")}
    assert told == public


def test_a_server_is_asked_and_its_death_is_one_line(
    model: str, corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai")
    from tests.self_study.completions_server import CompletionsServer

    def command(folder: str, *urls: str) -> list[str]:
        place = ["--output-dir", str(tmp_path / folder), "--engine", "openai", "--tokenizer", model]
        return ["synthesize", corpus, "--model", "tiny", *place, "--base-url", *urls, "--max-retries", "0", *SMALL]

    with CompletionsServer().running() as one, CompletionsServer().running() as other:
        assert main(command("well", one, other)) == 0
        assert not any(name.startswith("teacher_") for name in load_self_study(tmp_path / "well").column_names)
        # Scored afterwards, by the model's weights, without asking the server for anything but what is written already.
        scored = [*command("well", one), "--score-with", model, "--teacher-targets", "hidden_states"]
        written = _shards(tmp_path / "well", "written")
        assert main(scored) == 0 and _shards(tmp_path / "well", "written") == written
        found = load_self_study(tmp_path / "well")
        assert len(found) == 6 and read_provenance(found)["model_fingerprint"] == model_fingerprint(tiny_model())
        assert json.loads(found[0]["origin"])["model_fingerprint"] == model_fingerprint(tiny_model())
        top_k = [*command("top", one), "--teacher-targets", "top_k", "--teacher-top-k", "5"]
        assert main(top_k) == 0
        assert "teacher_top_k_ids" in load_self_study(tmp_path / "top").column_names
    with CompletionsServer(lambda number: 500).running() as url:
        assert main(command("ill", url)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("cartridges synthesize: error: The server at") and "status 500" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output-dir", "x", "--recitation-share", "2"], "`recitation_share` must be between 0 and 1, got 2.0."),
        ([], "--output-dir is missing"),
        (["--output-dir", "x", "--engine", "openai"], "`base_url` is missing"),
        (["--preview", "0"], "--preview shows at least 1 conversation, got 0."),
        (["--preview", "-1"], "--preview shows at least 1 conversation, got -1."),
        (["--output-dir", "x", "--push-to-hub", "not a name"], "--push-to-hub: 'not a name' is no name on the Hub"),
        (["--push-to-hub", "user/x"], "--output-dir is missing"),
        (
            ["--output-dir", "x", "--model", "./nowhere"],
            "--model: './nowhere' is neither a folder nor a name on the Hub",
        ),
        (["--output-dir", "x", "--tokenizer", "./nowhere"], "--tokenizer: './nowhere' is neither a folder nor a name"),
    ],
)
def test_mistakes_are_one_line(
    model: str, corpus: str, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["synthesize", corpus, "--model", model, *options]) == 1
    assert f"cartridges synthesize: error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--output-dir", "run"], ["--preview", "1"]])
def test_an_interrupted_run_says_how_it_is_carried_on(
    options: list[str], corpus: str, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    for method in ("synthesize", "preview"):
        monkeypatch.setattr(f"peft_cartridges.cli.synthesize.SelfStudySynthesizer.{method}", interrupted)
    assert main(["synthesize", corpus, "--model", model, *options, *SMALL]) == 130
    error = capsys.readouterr().err
    assert "cartridges synthesize: interrupted" in error
    assert ("kept in run; the same command carries on" in error) == ("run" in options)


def test_a_missing_corpus_is_named(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synthesize", "nowhere.md", "--model", model, "--preview", "1"]) == 1
    assert "There is no file or folder nowhere.md" in capsys.readouterr().err


def test_a_set_is_pushed_and_a_push_that_fails_loses_nothing(
    model: str,
    corpus: str,
    tmp_path: Path,
    hub: LocalHub,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.add_repo("user/open", {"README.md": b""}, private=False)
    command = ["synthesize", corpus, "--model", model, "--output-dir", str(tmp_path / "out"), *SMALL, "--push-to-hub"]
    assert main([*command, "user/open"]) == 1
    assert "`user/open` exists and is public" in capsys.readouterr().err
    shards = _shards(tmp_path / "out")
    assert len(load_self_study(tmp_path / "out")) == 6
    assert main([*command, "user/log"]) == 0
    assert capsys.readouterr().out.strip().endswith("/datasets/user/log") and hub.repos["user/log"].private
    assert _shards(tmp_path / "out") == shards
    assert read_report(load_self_study("user/log"))["corpus"]["name"] == "log.md"
    assert main([*command, "user/open", "--public"]) == 0
    assert len(load_self_study("user/open")) == 6
