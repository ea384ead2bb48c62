"""Pushes of the trainer, against a local Hub: a cartridge with its card, and nothing else that lies in the folder."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import load

from peft_cartridges import HubError, KVPrefix, SelfStudyTrainer
from peft_cartridges.cli.train import parse_args
from peft_cartridges.hub import CARD_TAGS, load_cartridge, load_facts
from peft_cartridges.hub.model_card import GENERATED_CARD
from tests.hub.conftest import hub, impatient  # noqa: F401 (fixtures)
from tests.hub.local_hub import LocalHub
from tests.tiny_models import tiny_model
from tests.trainer.small_runs import CORPUS, GOLD, TOKENIZER, make_config, make_trainer

CARTRIDGE = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "cartridge.json", "gate.safetensors", ".gitattributes",
}  # fmt: skip
TOKENIZER_FILES = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
FIGURES = {"training_curve.png", "memory.png"}
TOKEN = "hf_writer"


def _trainer(folder: Path, *, base: str = "org/base", dataset: Dataset = CORPUS, **options: Any) -> SelfStudyTrainer:
    """A run whose folder also holds the corpus, as people's do."""
    model = tiny_model()
    model.name_or_path = base
    settings = {"push_to_hub": True, "hub_model_id": "user/handbook", "hub_token": TOKEN, "max_steps": 2}
    trainer = make_trainer(folder, model, dataset, arguments={"gold_questions": GOLD}, **{**settings, **options})
    folder.mkdir(exist_ok=True)
    (folder / "corpus.md").write_text(CORPUS[0]["text"])
    return trainer


def assert_nothing_private(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        assert b"captain of w" not in content, f"{name} has the text"
        assert TOKEN.encode() not in content, f"{name} has the token"
        assert str(folder).encode() not in content, f"{name} has a path"
        assert not name.endswith((".bin", ".pt", ".pth")), f"{name} is pickled"


def _from_the_hub() -> Dataset:
    """The corpus as `load_dataset("org/corpus")` gives it."""
    dataset = Dataset.from_dict(CORPUS.to_dict())
    source = "hf://datasets/org/corpus@0123456789abcdef/data/train-00000-of-00001.parquet"
    dataset.info.download_checksums = {source: {"num_bytes": 1, "checksum": None}}
    return dataset


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_what_is_pushed_is_what_the_docs_say(hub: LocalHub, tmp_path: Path, strategy: str) -> None:  # noqa: F811
    pytest.importorskip("matplotlib")
    trainer = _trainer(
        tmp_path / "run", dataset=_from_the_hub(), hub_strategy=strategy, plot=True, save_strategy="steps",
        save_steps=1, eval_strategy="steps", eval_steps=2, license="cc-by-4.0", language="en",
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    pushed = hub.files("user/handbook")
    assert set(pushed) == CARTRIDGE | TOKENIZER_FILES | FIGURES
    assert_nothing_private(pushed, tmp_path)

    config = json.loads(pushed["adapter_config.json"])
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("CARTRIDGE", "org/base")
    trained = trainer.accelerator.unwrap_model(trainer.model).base_model.get_kv_prefix()
    weights = load(pushed["adapter_model.safetensors"])
    assert list(weights) == ["prompt_embeddings"]
    assert torch.equal(weights["prompt_embeddings"], trained.detach().to_prompt_embeddings())

    card = ModelCard(pushed["README.md"].decode())
    data = card.data.to_dict()
    assert (data["library_name"], data["base_model"], data["license"]) == ("peft", "org/base", "cc-by-4.0")
    assert (data["language"], data["datasets"]) == (["en"], ["org/corpus"])
    assert set(CARD_TAGS) | {"base_model:adapter:org/base"} <= set(data["tags"])
    results = {metric["type"]: metric for result in data["model-index"][0]["results"] for metric in result["metrics"]}
    assert results["gold_nll"]["value"] == pytest.approx(trainer.evaluate()["eval_gold_nll"], abs=1e-3)
    html = MarkdownIt().enable("table").render(card.text)
    for figure in FIGURES:
        assert pushed[figure].startswith(b"\x89PNG") and f'<img src="{figure}"' in html
    assert 'load_cartridge("user/handbook")' in card.text

    assert b"NaN" not in pushed["cartridge.json"] and ".nan" not in str(card)  # the share of a gap that is not there
    facts = json.loads(pushed["cartridge.json"])  # where it comes from
    assert facts["corpus_tokens"] and len(facts["corpus_sha256"]) == len(facts["base_identity"]["weights_sha256"]) == 64
    assert facts["recipe"]["optimizer_steps"] == 2 and sum(facts["seed_types"].values()) == facts["num_conversations"]
    assert facts["package_versions"]["torch"] == torch.__version__


def test_checkpoints_are_pushed_with_their_card_while_it_trains(hub: LocalHub, tmp_path: Path) -> None:  # noqa: F811
    trainer = _trainer(tmp_path / "run", hub_strategy="every_save", save_strategy="steps", save_steps=1)
    trainer.train()
    trainer._finish_current_push()
    pushed = hub.files("user/handbook")
    assert set(pushed) - FIGURES == CARTRIDGE | TOKENIZER_FILES
    assert_nothing_private(pushed, tmp_path)
    assert ModelCard(pushed["README.md"].decode()).data.base_model == "org/base"


@pytest.mark.parametrize(
    ("strategy", "folder"), [("checkpoint", "last-checkpoint"), ("all_checkpoints", "checkpoint-2")]
)
def test_whole_checkpoints_go_without_the_pickled_arguments(
    hub: LocalHub,  # noqa: F811
    tmp_path: Path,
    strategy: str,
    folder: str,
) -> None:
    trainer = _trainer(tmp_path / "run", hub_strategy=strategy, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer._finish_current_push()
    pushed = hub.files("user/handbook")
    assert {f"{folder}/optimizer.pt", f"{folder}/trainer_state.json"} <= set(pushed)
    assert not [name for name in pushed if name.endswith("training_args.bin")]
    assert not [name for name, content in pushed.items() if TOKEN.encode() in content]


def test_other_processes_push_nothing(
    hub: LocalHub,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SelfStudyTrainer, "is_world_process_zero", lambda self: False)
    trainer = _trainer(tmp_path / "run", hub_strategy="every_save", save_strategy="steps", save_steps=1)
    trainer.train()
    assert trainer.push_to_hub() is None and hub.requests == []


def test_training_goes_on_when_a_push_fails(
    hub: LocalHub,  # noqa: F811
    impatient: None,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer = _trainer(tmp_path / "run", hub_strategy="every_save", save_strategy="steps", save_steps=1)
    with hub.fault("/commit", status=500, times=999):
        trainer.train()
        trainer._finish_current_push()
        assert "trouble of its own" in caplog.text
        with pytest.raises(HubError, match="trouble of its own"):
            trainer.push_to_hub()
    assert trainer.state.global_step == 2 and (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_push_to_hub_takes_what_trainer_s_does(hub: LocalHub, tmp_path: Path) -> None:  # noqa: F811
    trainer = _trainer(tmp_path / "run", push_to_hub=False, license="mit")
    future = trainer.push_to_hub(
        "First", blocking=False, private=True, license="cc0-1.0", language=["de", "en"], tags="mine", model_name="Mine",
        dataset="org/corpus", revision="draft",
    )  # fmt: skip
    assert future.result().commit_message == "First"
    repo = hub.repos["user/handbook"]
    assert repo.private and "README.md" not in hub.files("user/handbook")
    card = ModelCard(hub.files("user/handbook", "draft")["README.md"].decode())
    assert (card.data.license, card.data.language, card.data.datasets) == ("cc0-1.0", ["de", "en"], ["org/corpus"])
    assert "mine" in card.data.tags and "# Mine" in card.text


def test_a_base_model_that_nobody_else_can_find_is_refused_before_anything_is_done(
    hub: LocalHub,  # noqa: F811
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="nobody could load it: set `finetuned_from='user/name'`"):
        _trainer(tmp_path / "run", base=str(tmp_path))
    assert hub.requests == [] and not (tmp_path / "run").exists()
    trainer = _trainer(tmp_path / "run", base=str(tmp_path), finetuned_from="org/base")
    trainer.save_model()
    assert_nothing_private(hub.files("user/handbook"), tmp_path)
    assert ModelCard(hub.files("user/handbook")["README.md"].decode()).data.base_model == "org/base"
    trainer = _trainer(tmp_path / "other", base=str(tmp_path), push_to_hub=False)
    with pytest.raises(ValueError, match="finetuned_from"):
        trainer.push_to_hub()
    trainer.push_to_hub(finetuned_from="org/other")
    assert json.loads(hub.files("user/handbook")["adapter_config.json"])["base_model_name_or_path"] == "org/other"


def test_what_was_to_be_private_is_refused_before_training(hub: LocalHub, tmp_path: Path) -> None:  # noqa: F811
    hub.add_repo("user/handbook", {"README.md": b"hello"})
    with pytest.raises(HubError, match="exists and is public"):
        _trainer(tmp_path / "run", hub_private_repo=True)


def test_a_card_that_someone_edited_is_kept(hub: LocalHub, tmp_path: Path) -> None:  # noqa: F811
    trainer = _trainer(tmp_path / "run", push_to_hub=False)
    trainer.save_model()
    readme = tmp_path / "run" / "README.md"
    readme.write_text(readme.read_text().replace(GENERATED_CARD, "My own words."))
    trainer.save_model()
    trainer.push_to_hub()
    assert "My own words." in readme.read_text()
    assert "My own words." in hub.files("user/handbook")["README.md"].decode()
    assert load_facts(tmp_path / "run").corpus_tokens


def test_the_licence_is_what_somebody_said(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    for options, expected in (({}, None), ({"license": "mit"}, "mit")):
        make_trainer(tmp_path / "run", type(tiny_model()).from_pretrained(base), **options).save_model()
        card = ModelCard.load(tmp_path / "run" / "README.md")
        assert card.data.license == expected and "under the licence `apache-2.0`" in card.text


def test_the_command_on_the_card_makes_such_a_run_and_tells_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/here/train.py", "--engine-options", '{"api_key": "sk-secret"}'])
    model = tiny_model()
    model.name_or_path = "/home/alice/small-llama"
    trainer = make_trainer(
        tmp_path / "run", model, arguments={"gold_questions": GOLD}, hub_token=TOKEN, base_url=["http://me:pw@internal/v1"],
        engine_options={"api_key": "sk-secret"}, seed_prompts=["Ask of the merger."], ema_decay=0.5,
        seed_types=["question", "creative"], run_name="merger",
    )  # fmt: skip
    trainer.evaluate()
    trainer.save_model()
    written = (tmp_path / "run" / "README.md").read_text()
    private = (TOKEN, "sk-secret", "internal", "alice", "merger", str(tmp_path), "train.py")
    assert not [word for word in private if word in written]
    (line,) = [line for line in written.splitlines() if line.startswith("cartridges train")]
    told = parse_args(shlex.split(line)[2:])
    assert (told.corpus, told.model.model, told.model.num_tokens) == (["CORPUS"], "small-llama", 8)
    for name in ("learning_rate", "ema_decay", "seed_types", "max_steps", "num_conversations", "max_chunk_tokens"):
        assert getattr(told.trainer, name) == getattr(trainer.args, name), name


def test_what_is_pushed_loads_and_says_the_same(hub: LocalHub, tmp_path: Path) -> None:  # noqa: F811
    trainer = _trainer(tmp_path / "run")
    trainer.train()
    trainer.push_to_hub()
    TOKENIZER.save_pretrained(tmp_path / "base")
    tiny_model().save_pretrained(tmp_path / "base")
    loaded, _ = load_cartridge("user/handbook", base_model=tmp_path / "base")
    trained: KVPrefix = trainer.accelerator.unwrap_model(trainer.model).base_model.get_kv_prefix()
    assert torch.equal(loaded.base_model.get_kv_prefix().to_prompt_embeddings(), trained.to_prompt_embeddings())


def test_a_single_language_may_stand_without_brackets(tmp_path: Path) -> None:
    assert make_config(tmp_path, language="en").language == ["en"]
