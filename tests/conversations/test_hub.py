"""A conversation set's way over the Hub: private unless told otherwise, whole or not at all, and back with its origin."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset

from peft_cartridges import HubError, SelfStudySynthesizer, load_self_study
from peft_cartridges.conversations import (
    make_dataset_card,
    merge_self_study,
    push_self_study,
    read_provenance,
    read_report,
)
from peft_cartridges.conversations.provenance import describe
from tests.hub.conftest import hub  # noqa: F401 (a fixture)
from tests.hub.local_hub import LocalHub
from tests.self_study import runs
from tests.tiny_models import tiny_model, tiny_tokenizer

NAME = "user/log-conversations"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set")
    runs.synthesize(path, num_conversations=8)
    return path


def test_a_set_comes_back_as_it_was(hub: LocalHub, folder: Path) -> None:  # noqa: F811
    there = load_self_study(folder)
    address = push_self_study(folder, NAME)
    assert address.endswith(f"/datasets/{NAME}") and hub.repos[NAME].private
    back = load_self_study(NAME)
    assert back.features == there.features and back.to_dict() == there.to_dict()
    assert read_report(back) == read_report(there)
    # Also for those who know nothing of us.
    (data,) = [content for name, content in hub.files(NAME).items() if name.endswith(".parquet")]
    (folder / "plain.parquet").write_bytes(data)
    plain = load_dataset("parquet", data_files=str(folder / "plain.parquet"), split="train")
    assert plain.to_dict() == there.to_dict()


def test_a_revision_is_named_and_a_missing_one_is_an_error(hub: LocalHub, folder: Path) -> None:  # noqa: F811
    push_self_study(folder, NAME)
    first = hub.repos[NAME].branches["main"]
    push_self_study(load_self_study(folder).select(range(3)), NAME)
    assert len(load_self_study(NAME, revision=first)) == 8 and len(load_self_study(NAME)) == 3
    with pytest.raises(HubError, match="has no revision `v9`"):
        load_self_study(NAME, revision="v9")
    with pytest.raises(HubError, match="There is no `user/nothing`"):
        load_self_study("user/nothing")


@pytest.mark.parametrize("private", [True, False])
def test_a_public_repository_gets_no_private_corpus(
    private: bool,
    hub: LocalHub,  # noqa: F811
    folder: Path,
) -> None:
    hub.add_repo(NAME, {"README.md": b"open"}, private=False)
    if private:
        with pytest.raises(HubError, match=r"exists and is public, and the conversations hold passages of your corpus"):
            push_self_study(folder, NAME)
        assert hub.files(NAME) == {"README.md": b"open"}
        assert not any("preupload" in path or "lfs" in path for _, path, _ in hub.requests), "something was sent"
    else:
        push_self_study(folder, NAME, private=False)
        assert "self_study.json" in hub.files(NAME)


def test_a_push_that_fails_leaves_nothing_half_there_and_can_be_done_again(
    hub: LocalHub,  # noqa: F811
    folder: Path,
) -> None:
    for pattern in ("PUT /lfs/", "POST .*/commit/"):
        with hub.fault(pattern, status=403, times=99), pytest.raises(HubError):
            push_self_study(folder, NAME)
        assert set(hub.files(NAME)) == {".gitattributes"}
    push_self_study(folder, NAME)
    assert len(load_self_study(NAME)) == 8


def test_what_an_earlier_push_left_is_gone(hub: LocalHub, folder: Path) -> None:  # noqa: F811
    hub.add_repo(NAME, {"data/train-00000-of-00002.parquet": b"old", "notes.txt": b"mine"}, private=True)
    push_self_study(folder, NAME)
    assert set(hub.files(NAME)) == {"README.md", "self_study.json", "data/train-00000-of-00001.parquet", "notes.txt"}


def test_the_card_says_what_it_is_and_how_it_is_loaded(hub: LocalHub, folder: Path) -> None:  # noqa: F811
    push_self_study(folder, NAME)
    card = hub.files(NAME)["README.md"].decode()
    assert card.startswith("---\n") and "- cartridges" in card and "path: data/train-*" in card
    assert f"load_self_study('{NAME}')" in card and "8 conversations kept of" in card
    assert "teacher_hidden_states" in card and '"min_chunk_tokens": 30' in card
    told = json.loads(hub.files(NAME)["self_study.json"])
    assert told["corpus"]["name"] == "doc0" and told["report"]["kept"] == 8


def test_other_data_sets_have_no_card(folder: Path) -> None:
    with pytest.raises(ValueError, match="carries no description"):
        make_dataset_card(Dataset.from_dict({"text": ["x"]}), NAME)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert len(merge_self_study([load_self_study(folder)])) == 8


@pytest.mark.parametrize("written_by", ["us", "hand"])
def test_keys_servers_and_folders_stay_here(hub: LocalHub, tmp_path: Path, written_by: str) -> None:  # noqa: F811
    private = {"engine_options": {"api_key": "sk-secret"}, "base_url": ["http://me:pw@internal:8000/v1"]}
    model, home = tiny_model(), "/home/alice/models/small-llama"
    model.config._name_or_path = home
    settings = runs.settings(num_conversations=4, **private)
    made = SelfStudySynthesizer(model, tiny_tokenizer(), settings).synthesize(runs.TEXT, tmp_path / "set")
    if written_by == "hand":  # a description that was not made here
        told = read_report(made)
        told = {**told, "base_model": home, "synthesis": {**told["synthesis"], **private, "engine_model": home}}
        made = made.map(lambda row: {"origin": json.dumps({**json.loads(row["origin"]), "base_model": home})})
        made = describe(made, {**told, "merged_from": [told], "decided_by": {"model": home}})
    else:
        told = (tmp_path / "set" / "self_study.json").read_text() + "".join(made["origin"])
        assert not [word for word in ("sk-secret", "internal", "alice") if word in told]
    push_self_study(made, NAME)
    (tmp_path / "rows.parquet").write_bytes(hub.files(NAME)["data/train-00000-of-00001.parquet"])
    rows = load_self_study(tmp_path / "rows.parquet")
    pushed = "".join(rows["origin"]) + "".join(
        hub.files(NAME)[name].decode() for name in ("README.md", "self_study.json")
    )
    assert not [word for word in ("sk-secret", "internal", "alice") if word in pushed]
    assert read_provenance(rows)["base_model"] == "small-llama" and rows.features == made.features
