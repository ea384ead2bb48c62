"""`cartridges train` and `cartridges info`: from files to a cartridge that answers, and what goes wrong on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from peft_cartridges import load_cartridge
from peft_cartridges.adapter_folder import read_cartridge
from peft_cartridges.cli import main
from peft_cartridges.cli.train import make_parser
from tests.hub.conftest import hub  # noqa: F401 (a fixture)
from tests.hub.local_hub import LocalHub
from tests.tiny_models import tiny_model
from tests.trainer.small_runs import GOLD, TEXT, TOKENIZER

SYNTHESIS = [
    "--num-conversations", "16", "--conversations-per-chunk", "4", "--min-chunk-tokens", "30", "--max-chunk-tokens", "40",
    "--max-question-tokens", "6", "--max-answer-tokens", "8", "--quality-filters", "empty",
]  # fmt: skip
TRAINING = ["--num-tokens", "8", "--use-cpu", "--steps", "4", "--logging-steps", "1", "--warmup-steps", "0"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "corpus.md").write_text(TEXT)
    (tmp_path / "gold.jsonl").write_text("\n".join(map(json.dumps, GOLD)))
    return tmp_path


def _train(folder: Path, *options: str, corpus: bool = True, name: str = "out") -> int:
    texts = [str(folder / "corpus.md")] if corpus else []
    common = ["--model", str(folder / "model"), "--output-dir", str(folder / name), "--plot", "false"]
    return main(["train", *texts, *common, *TRAINING, *options])


def test_from_a_file_to_a_cartridge_that_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gold = ["--gold-questions", str(folder / "gold.jsonl"), "--num-eval-conversations", "4"]
    assert _train(folder, *SYNTHESIS, *gold, "--save-steps", "2") == 0
    said = capsys.readouterr().err
    assert "Corpus: 1 document, 360 tokens" in said and "To write: 16 conversations" in said
    assert "Warning" not in said and f"The cartridge is in {folder / 'out'}" in said
    out = folder / "out"
    assert {"README.md", "cartridge.json", "eval_results.json", "adapter_model.safetensors"} <= {
        path.name for path in out.iterdir()
    }
    assert "eval_gold_nll" in json.loads((out / "eval_results.json").read_text())
    model, _ = load_cartridge(out)
    answer = model.generate(torch.tensor([[9, 10, 11]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert answer.shape[1] > 3

    assert main(["info", str(out)]) == 0
    told = capsys.readouterr().out
    for line in ("tokens:", "8, 1 of them frozen", "corpus.md, 360 tokens", "16 (", "optimizer_steps 4", "gold_nll:"):
        assert line in told
    written = {path: path.stat().st_mtime_ns for path in (out / "_conversations").rglob("*.arrow")}
    assert written
    assert _train(folder, *SYNTHESIS, *gold, "--save-steps", "2") == 0  # nothing is left to do
    assert written == {path: path.stat().st_mtime_ns for path in (out / "_conversations").rglob("*.arrow")}


def test_written_conversations_are_trained_on(folder: Path) -> None:
    written = ["synthesize", str(folder / "corpus.md"), "--model", str(folder / "model"), "--dtype", "float32"]
    assert main([*written, "--output-dir", str(folder / "set"), *SYNTHESIS]) == 0
    assert _train(folder, "--conversations", str(folder / "set"), corpus=False) == 0
    assert json.loads((folder / "out" / "cartridge.json").read_text())["num_conversations"] == 16


def test_no_steps_only_initialize_the_cartridge(folder: Path) -> None:
    assert _train(folder, "--steps", "0", *SYNTHESIS) == 0
    assert not (folder / "out" / "_conversations").exists() and (folder / "out" / "README.md").is_file()
    facts = json.loads((folder / "out" / "cartridge.json").read_text())
    assert facts["recipe"]["optimizer_steps"] == 0 and not facts.get("num_conversations")
    # By the values that are fitted, and not by what training begins with.
    assert _train(folder, "--steps", "0", "--initialization", "attention_matching", *SYNTHESIS, name="matched") == 0
    assert _train(folder, "--steps", "0", "--initialization", "most_attended", *SYNTHESIS, name="attended") == 0
    made, matched, attended = (read_cartridge(folder / name)[1].values[1] for name in ("out", "matched", "attended"))
    assert torch.equal(made, matched) and not torch.allclose(made, attended)


def test_an_estimate_loads_no_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model" / "model.safetensors").unlink()
    assert _train(folder, "--estimate", *SYNTHESIS) == 0
    assert "at most" in capsys.readouterr().err and not (folder / "out").exists()


def test_yaml_and_the_command_line_share_their_options(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(
        f"model: {folder / 'model'}\nnum_tokens: 6\ncorpus: [{folder / 'corpus.md'}]\nseed_types: [question]\n"
        "max_steps: 0\nuse_cpu: true\n"
    )
    command = ["train", f"--config={folder / 'recipe.yaml'}", "--num-tokens", "5"]
    assert main([*command, "--output-dir", str(folder / "out")]) == 0
    assert json.loads((folder / "out" / "adapter_config.json").read_text())["num_virtual_tokens"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-tokens", "0"], "--num-tokens must be at least 1, got 0"),
        (["--loss-type", "kl"], "`loss_type` must be one of forward_kl"),
        (["--load-in-4bit", "--load-in-8bit"], "--load-in-4bit and --load-in-8bit do not go together"),
        (["--gold-questions", "missing.jsonl"], "missing.jsonl"),
        (["--model", "no/such-model"], "--model: the tokenizer of 'no/such-model' could not be loaded"),
        (["--tokens", "3"], "--tokens"),
        (["--steps", "2", "--num-tokens", "400", *SYNTHESIS], "fewer than `num_tokens=400`"),
        (["--num-tokens", "9999", *SYNTHESIS], "the model has 512 positions"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert _train(folder, *options) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("cartridges train: error: ") and message in line


@pytest.mark.parametrize(
    ("written", "message"),
    [("num_tokens: [4", "recipe.yaml is no YAML"), ("num_tokns: 4", "recipe.yaml: there is no option num_tokns"),
     ("- 4", "recipe.yaml is no YAML with `option: value` lines"), (None, "--config: there is no file")],
)  # fmt: skip
def test_a_recipe_that_cannot_be_read_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], written: str | None, message: str
) -> None:
    if written is not None:
        (folder / "recipe.yaml").write_text(written)
    assert _train(folder, "--config", str(folder / "recipe.yaml")) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("cartridges train: error: ") and message in line


def test_what_is_missing_is_said_before_anything_is_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = ["--model", str(folder / "model")], ["--output-dir", str(folder / "out")]
    for command, message in (
        (["train", *model, *out], "CORPUS is missing"),
        (["train", "x.md", *model], "--output-dir is missing"),
        (["train", "x.md", "--model", "no where", *out], "--model: 'no where' is neither a folder nor a name"),
        (["info", "no where"], "'no where' is neither a folder nor a name on the Hub"),
    ):
        assert main(command) == 1
        assert message in capsys.readouterr().err


def test_a_folder_with_another_cartridge_is_not_carried_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(folder, *SYNTHESIS, "--save-steps", "2") == 0
    assert _train(folder, *SYNTHESIS, "--num-tokens", "7") == 1
    assert "holds a run with --num-tokens 8" in capsys.readouterr().err


def test_help_teaches_and_hides_the_many() -> None:
    short, long = make_parser().format_help(), make_parser(show_all=True).format_help()
    assert "cartridges train handbook.md" in short and "--num-tokens" in short and "--num_tokens" not in short
    assert "--fsdp-config" not in short and "--fsdp-config" in long and len(short) < len(long) / 2


def test_info_of_a_cartridge_on_the_hub_fetches_no_weights(
    hub: LocalHub,  # noqa: F811
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _train(folder, "--steps", "0") == 0
    assert main(["push", str(folder / "out"), "user/handbook", "--base-model", "org/base"]) == 0
    hub.requests.clear()
    capsys.readouterr()
    assert main(["info", "user/handbook"]) == 0
    told = capsys.readouterr().out
    assert "org/base" in told and "MB in its file" in told
    assert not [one for one in hub.requests if one[0] == "GET" and "adapter_model.safetensors" in str(one)], (
        hub.requests
    )
