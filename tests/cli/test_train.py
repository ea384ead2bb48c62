"""`cartridges train` and `cartridges info`: from files to a cartridge that answers, and what goes wrong on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_cartridges import Gate, load_cartridge
from peft_cartridges.adapter_folder import read_cartridge
from peft_cartridges.cli import main
from peft_cartridges.cli.train import make_parser, suggest_num_tokens
from tests.hub.conftest import hub  # noqa: F401 (a fixture)
from tests.hub.local_hub import LocalHub
from tests.tiny_models import tiny_model
from tests.trainer.small_runs import GOLD, TEXT, TOKENIZER

SYNTHESIS = [
    "--num-conversations", "16", "--conversations-per-chunk", "4", "--min-chunk-tokens", "30", "--max-chunk-tokens", "40",
    "--max-question-tokens", "6", "--max-answer-tokens", "8", "--quality-filters", "empty",
    "--off-context-share", "0.2",
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
    assert "4 general conversations beside them" in said
    assert "Warning" not in said and f"The cartridge is in {folder / 'out'}" in said
    out = folder / "out"
    assert {"README.md", "cartridge.json", "eval_results.json", "adapter_model.safetensors", "gate.safetensors"} <= {
        path.name for path in out.iterdir()
    }
    assert "eval_gold_nll" in json.loads((out / "eval_results.json").read_text())
    model, _ = load_cartridge(out)
    answer = model.generate(torch.tensor([[9, 10, 11]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert answer.shape[1] > 3

    assert main(["info", str(out)]) == 0
    told = capsys.readouterr().out
    for line in (
        "tokens:",
        "8, 1 of them frozen",
        "corpus.md, 360 tokens",
        "20 (",
        "general 4",
        "optimizer_steps 4",
        "gold_nll:",
        "gate:",
    ):
        assert line in told
    assert "MB in its file (float32)" in told
    for quantization, shown in (("int8", "(int8)"), ("none", "(16-bit floats)")):
        assert main(["quantize", str(out), "--to", quantization, "--output-dir", str(folder / quantization)]) == 0
        assert main(["info", str(folder / quantization)]) == 0
        assert f"MB in its file {shown}" in capsys.readouterr().out
    written = {path: path.stat().st_mtime_ns for path in (out / "_conversations").rglob("*.arrow")}
    assert written
    assert _train(folder, *SYNTHESIS, *gold, "--save-steps", "2") == 0  # nothing is left to do
    assert written == {path: path.stat().st_mtime_ns for path in (out / "_conversations").rglob("*.arrow")}


def test_written_conversations_are_trained_on(folder: Path) -> None:
    written = ["synthesize", str(folder / "corpus.md"), "--model", str(folder / "model"), "--dtype", "float32"]
    assert main([*written, "--output-dir", str(folder / "set"), *SYNTHESIS]) == 0
    assert _train(folder, "--conversations", str(folder / "set"), corpus=False) == 0
    assert json.loads((folder / "out" / "cartridge.json").read_text())["num_conversations"] == 20


def test_a_budget_says_what_it_chose(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(folder, *SYNTHESIS, "--budget", "10m", "--disable-tqdm", "false") == 0
    assert "Budget 10m: 16 conversations, 4 steps" in capsys.readouterr().err
    recipe = json.loads((folder / "out" / "cartridge.json").read_text())["recipe"]
    assert recipe["budget"] == "10m" and recipe["off_context_share"] == 0.2


def test_the_gate_is_the_text_s_and_can_be_left_out_and_made_later(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = ["synthesize", str(folder / "corpus.md"), "--model", str(folder / "model"), "--dtype", "float32"]
    assert main([*written, "--output-dir", str(folder / "set"), *SYNTHESIS]) == 0
    assert _train(folder, *SYNTHESIS) == 0
    expected = Gate.make(TEXT, TOKENIZER)
    trained = Gate.from_pretrained(folder / "out")
    assert torch.equal(trained.weights, expected.weights) and trained.threshold == expected.threshold
    assert _train(folder, "--conversations", str(folder / "set"), corpus=False, name="written") == 0
    written_about = set(Gate.from_pretrained(folder / "written").words.tolist())  # the chunks that were drawn
    assert len(expected.words) * 0.6 < len(written_about & set(expected.words.tolist()))
    assert len(written_about - set(expected.words.tolist())) <= 2 * 4  # words that a chunk's ends cut

    assert _train(folder, "--steps", "0", "--gate", "false", *SYNTHESIS, name="none") == 0
    none = folder / "none"
    assert not (none / "gate.safetensors").exists() and "gate" not in json.loads((none / "cartridge.json").read_text())
    capsys.readouterr()
    question, other = "what says the captain of w60 ?", "write me a haiku in spanish"
    assert main(["gate", str(none), "--ask", question]) == 1 and "has no gate" in capsys.readouterr().err
    base = ["--base-model", str(folder / "model")]
    assert (
        main(["gate", str(none), "--corpus", str(folder / "corpus.md"), *base, "--ask", question, "--ask", other]) == 0
    )
    told = capsys.readouterr().out
    assert f"accepted ({expected.score(question):+.2f}" in told and f"rejected ({expected.score(other):+.2f}" in told
    assert f"Rejected: {expected.general_rejected:.1%} of {expected.num_general}" in told
    assert Gate.from_pretrained(none).threshold == expected.threshold
    assert json.loads((none / "cartridge.json").read_text())["gate"]["words"] == len(expected.words)
    assert "Gate (`gate.safetensors`)" in (none / "README.md").read_text()

    (folder / "general.jsonl").write_text('{"prompt": "what says the captain"}\n{"prompt": "a haiku"}\n')
    given = [
        "--general",
        str(folder / "general.jsonl"),
        "--reject-general",
        "0.5",
        "--conversations",
        str(folder / "set"),
    ]
    assert main(["gate", str(none), *given, *base]) == 0
    assert "questions of the conversations" in capsys.readouterr().out
    made = Gate.from_pretrained(none)
    assert made.threshold == made.score("what says the captain")
    for wrong, message in (
        (["--corpus", "x", "--conversations", "y"], "give one of them"),
        ([], "give --corpus or --conversations"),
        (["--corpus", str(folder / "corpus.md"), "--general", str(folder / "corpus.md")], "line 1 of"),
    ):
        assert main(["gate", str(none), *wrong]) == 1 and message in capsys.readouterr().err


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


def test_no_steps_announce_and_measure_what_they_make(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(folder, "--steps", "0", *SYNTHESIS) == 0
    said = capsys.readouterr().err
    assert "To write: nothing (--steps 0 only initializes the cartridge)" in said and "16 conversations" not in said
    assert _train(folder, "--steps", "0", *SYNTHESIS, "--num-eval-conversations", "4", name="held_out") == 0
    said = capsys.readouterr().err
    assert "To write: 4 held-out conversations (--num-eval-conversations), to measure on" in said
    assert "16 conversations" not in said
    results = json.loads((folder / "held_out" / "eval_results.json").read_text())
    assert results["eval_loss"] > 0 and "eval_conversation_gap_closed" in results
    facts = json.loads((folder / "held_out" / "cartridge.json").read_text())
    assert facts["recipe"]["optimizer_steps"] == 0 and not facts.get("num_conversations")


def test_what_a_budget_writes_is_said_as_a_limit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without = SYNTHESIS[2:]  # without --num-conversations
    assert _train(folder, "--estimate", "--budget", "5m", *without) == 0
    said = capsys.readouterr().err
    assert "To write: as many as fit into --budget 5m, which is measured when the run begins, and at most 512" in said
    assert _train(folder, "--estimate", "--budget", "5m", *SYNTHESIS) == 0
    assert "To write: 16 conversations (" in capsys.readouterr().err, "what is given stands"


def test_rounds_are_estimated_as_they_are_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--resample-every",
        "2",
        "--steps",
        "5",
        "--per-device-train-batch-size",
        "10",
        "--off-context-share",
        "0.1",
    ]
    assert _train(folder, "--estimate", *SYNTHESIS, *options) == 0
    said = capsys.readouterr().err
    assert "To write: 3 rounds (--resample-every), each of 18 conversations (" in said
    assert "\n2 general conversations beside them" in said


def test_without_a_length_it_is_a_tenth_of_the_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--model", str(folder / "model"), "--use-cpu", "--steps", "0"]
    assert main(["train", str(folder / "corpus.md"), *place, "--output-dir", str(folder / "out"), *SYNTHESIS]) == 0
    said = capsys.readouterr().err
    # 2 layers, keys and values, 2 heads of 8 numbers: 64 numbers a token, of 36 tokens and of 360.
    assert "Cartridge: 36 tokens (--num-tokens; 18 is bold, 64 is safe), at most 0.01 MB in its file" in said
    assert "0.00 MB in place of the text's 0.05 where it is served" in said
    assert json.loads((folder / "out" / "adapter_config.json").read_text())["num_virtual_tokens"] == 36
    written = ["synthesize", str(folder / "corpus.md"), "--model", str(folder / "model"), "--dtype", "float32"]
    assert main([*written, "--output-dir", str(folder / "set"), *SYNTHESIS]) == 0
    place += ["--output-dir", str(folder / "other")]
    assert main(["train", "--conversations", str(folder / "set"), *place]) == 0
    assert json.loads((folder / "other" / "adapter_config.json").read_text())["num_virtual_tokens"] == 36


@pytest.mark.parametrize(
    ("corpus", "shares"),
    [(0, (512, 256, 1024)), (5, (1, 1, 1)), (700, (64, 35, 128)), (10_000, (992, 496, 2000)), (10**6, (8192,) * 3)],
)
def test_suggested_lengths(corpus: int, shares: tuple[int, ...]) -> None:
    assert tuple(suggest_num_tokens(corpus, share) for share in (10, 20, 5)) == shares


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
        (["--num-tokens", "-1"], "--num-tokens must be at least 0, got -1"),
        (["--loss-type", "kl"], "`loss_type` must be one of forward_kl"),
        (["--load-in-4bit", "--load-in-8bit"], "--load-in-4bit and --load-in-8bit do not go together"),
        (["--gold-questions", "missing.jsonl"], "missing.jsonl"),
        (["--model", "no/such-model"], "--model: the tokenizer of 'no/such-model' could not be loaded"),
        (["--tokens", "3"], "--tokens"),
        (["--steps", "0", "--budget", "5m"], "`budget` does not go with `max_steps=0` (`--steps 0`)"),
        (["--conversations", "set", "--num-eval-conversations", "4"], "--num-eval-conversations does not go with"),
        (["--budget", "soon"], "`budget` is 'soon': give a time, for instance 90s, 5m or 1h30m"),
        (["--off-context-dataset", "no.jsonl", *SYNTHESIS], "`off_context_dataset` is 'no.jsonl': give a file"),
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


def test_a_folder_with_the_run_of_something_else_is_not_carried_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "other.md").write_text(TEXT.replace("captain", "keeper"))
    written = ["synthesize", str(folder / "other.md"), "--model", str(folder / "model"), "--dtype", "float32"]
    assert main([*written, "--output-dir", str(folder / "set"), *SYNTHESIS]) == 0
    assert _train(folder, *SYNTHESIS) == 0
    files = {path: path.read_bytes() for path in (folder / "out").rglob("*.safetensors")}
    text = (folder / "corpus.md").read_text()

    def refused(*options: str, corpus: bool = True) -> str:
        assert _train(folder, *SYNTHESIS, *options, corpus=corpus) == 1
        assert files == {path: path.read_bytes() for path in (folder / "out").rglob("*.safetensors")}
        return capsys.readouterr().err.strip().splitlines()[-1]

    for wiped in (False, True):  # without checkpoints there is still a cartridge
        if wiped:
            for path in (folder / "out").glob("checkpoint-*"):
                shutil.rmtree(path)
            files = {path: path.read_bytes() for path in (folder / "out").rglob("*.safetensors")}
        (folder / "corpus.md").write_text((folder / "other.md").read_text())
        line = refused()
        assert "`output_dir` (" in line and "holds the run of another cartridge: corpus (" in line
        assert "another `output_dir`" in line
        (folder / "corpus.md").write_text(text)
        assert "recitation_share (0.5 there, 0.25 now)" in refused("--recitation-share", "0.25")
        assert "loss_type ('forward_kl' there, 'jsd' now)" in refused("--loss-type", "jsd")
        assert "conversations (None there, " in refused("--conversations", str(folder / "set"), corpus=False)
    assert "--steps 0 would put an untrained cartridge" in refused("--steps", "0")
    tiny_model(seed=3).save_pretrained(folder / "model")
    assert "model (" in refused()


def test_more_steps_carry_a_run_on_and_a_finished_one_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(folder, *SYNTHESIS) == 0
    assert _train(folder, *SYNTHESIS, "--learning-rate", "0.01", "--num-conversations", "20") == 0
    assert "The run was finished: more --steps carry it on" in capsys.readouterr().err
    assert _train(folder, *SYNTHESIS, "--steps", "5") == 0
    told = capsys.readouterr().err
    assert "Carrying on at" in told and "was finished" not in told
    facts = json.loads((folder / "out" / "cartridge.json").read_text())
    assert facts["recipe"]["optimizer_steps"] == 5


def test_the_same_command_again_trains_no_step_more(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # three steps are a pass and a half
        assert _train(folder, *SYNTHESIS, "--steps", "3") == 0
        kept = {path: path.read_bytes() for path in (folder / "out").rglob("adapter_model.safetensors")}
    assert "The run was finished" in capsys.readouterr().err
    assert json.loads((folder / "out" / "cartridge.json").read_text())["recipe"]["optimizer_steps"] == 3
    shutil.rmtree(folder / "out")
    assert _train(folder, *SYNTHESIS, "--steps", "3") == 0
    assert kept == {path: path.read_bytes() for path in (folder / "out").rglob("adapter_model.safetensors")}


def test_a_cartridge_begins_with_another_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(folder, "--steps", "0", "--initialization", "first_tokens", name="first") == 0
    pretrained = ["--initialization", "pretrained", "--initialization-kwargs"]
    assert _train(folder, "--steps", "0", *pretrained, json.dumps({"cartridge": str(folder / "first")})) == 0
    first, out = (load_file(folder / name / "adapter_model.safetensors") for name in ("first", "out"))
    assert all(torch.equal(first[name], out[name]) for name in first)
    assert _train(folder, "--initialization", "pretrained", name="x") == 1
    assert "The strategy `pretrained` needs the option `cartridge`" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "synthesize"])
def test_a_server_that_is_not_there_is_one_line_and_nothing_is_left(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai")
    place = ["--model", str(folder / "model"), "--output-dir", str(folder / "out")]
    server = ["--engine", "openai", "--base-url", "http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"]
    assert main([command, str(folder / "corpus.md"), *place, *server, *SYNTHESIS]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(
        f"cartridges {command}: error: `base_url`: the server at http://127.0.0.1:1/v1 cannot be reached"
    )
    assert not (folder / "out").exists()


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
