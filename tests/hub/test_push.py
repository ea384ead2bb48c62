"""Pushing with the real client: what goes up, what never does, and what is said when it cannot."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load

from peft_cartridges import Gate, HubError, KVPrefix, push_cartridge
from peft_cartridges.adapter_folder import read_cartridge
from peft_cartridges.hub import CARD_TAGS, CardFacts, Metric, write_model_card
from peft_cartridges.hub.push import complete_facts
from tests.exactness import cartridge_model
from tests.hub.local_hub import LocalHub
from tests.test_adapter_folder import WEIGHTS, edit_config, saved
from tests.tiny_models import tiny_model, tiny_tokenizer, token_ids

FILES = {"README.md", "adapter_config.json", WEIGHTS, "cartridge.json", ".gitattributes"}
PNG = b"\x89PNG\r\n\x1a\n"


def _folder(tmp_path: Path) -> Path:
    """A cartridge among what else lies in the folder of a training run."""
    folder = saved(tmp_path / "run")
    edit_config(folder, base_model_name_or_path="org/base")
    (folder / "training_curve.png").write_bytes(PNG)
    for name in ("corpus.md", "conversations.parquet", "training_args.bin", "optimizer.pt", "modeling.py", ".env"):
        (folder / name).write_text("private")
    (folder / "checkpoint-10").mkdir(exist_ok=True)
    (folder / "checkpoint-10" / WEIGHTS).write_bytes(b"private")
    return folder


def test_a_folder_is_pushed_with_its_card_and_nothing_else(hub: LocalHub, tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    push = push_cartridge(folder, "user/handbook")
    pushed = hub.files("user/handbook")
    assert set(pushed) == FILES | {"training_curve.png"} and set(push.files) == set(pushed) - {".gitattributes"}
    assert pushed[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert push.url is not None and push.url.startswith(f"{hub.url}/user/handbook/commit/")
    card = ModelCard(pushed["README.md"].decode())
    assert set(CARD_TAGS) | {"base_model:adapter:org/base"} <= set(card.data.tags)
    assert 'load_cartridge("user/handbook")' in card.text
    # Weights went by LFS, text in the commit itself.
    assert [path for method, path, _ in hub.requests if method == "PUT"] and hub.repos["user/handbook"].lfs_paths == {
        WEIGHTS,
        "training_curve.png",
    }
    assert not hub.repos["user/handbook"].private
    assert sorted(path.name for path in folder.iterdir() if path.name == "cartridge.json") == []  # it is left as it was


def test_the_gate_goes_with_it_and_comes_back(hub: LocalHub, tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    gate = Gate.make("the old captain says yes . the new ship is red .", tiny_tokenizer())
    gate.save_pretrained(folder)
    push_cartridge(folder, "user/handbook")
    pushed = hub.files("user/handbook")
    assert set(pushed) == FILES | {"training_curve.png", "gate.safetensors"}
    assert "Gate (`gate.safetensors`)" in pushed["README.md"].decode()
    assert json.loads(pushed["cartridge.json"])["gate"]["num_general"] == gate.num_general
    assert Gate.from_pretrained("user/handbook").threshold == gate.threshold
    (folder / "gate.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(ValueError, match=r"gate\.safetensors is damaged"):
        push_cartridge(folder, "user/handbook")


def test_the_corpus_goes_only_if_it_is_asked_for(hub: LocalHub, tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    push_cartridge(folder, "user/handbook", include=["corpus.md"])
    assert hub.files("user/handbook")["corpus.md"] == b"private"
    for name in ("nothing.md", "../run/corpus.md", "checkpoint-10"):
        with pytest.raises(FileNotFoundError, match="`include` names"):
            push_cartridge(folder, "user/other", include=[name])


def test_a_dry_run_shows_all_and_sends_nothing(hub: LocalHub, tmp_path: Path) -> None:
    push = push_cartridge(_folder(tmp_path), "user/handbook", private=True, revision="draft", dry_run=True)
    assert hub.requests == [] and push.url is None
    shown = str(push)
    assert "user/handbook at draft (private)" in shown and f"{push.files[WEIGHTS]:,}  {WEIGHTS}" in shown
    assert "corpus" not in shown


def test_private_repositories_branches_and_pull_requests(hub: LocalHub, tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    push_cartridge(folder, "user/secret", private=True)
    assert hub.repos["user/secret"].private
    push_cartridge(folder, "user/secret", private=True)
    push_cartridge(folder, "user/branches", revision="v2")
    assert WEIGHTS in hub.files("user/branches", "v2") and WEIGHTS not in hub.files("user/branches")
    push_cartridge(folder, "user/branches", revision="v2")
    push = push_cartridge(folder, "user/branches", create_pr=True)
    assert push.url is not None and push.url.endswith("/discussions/1")
    assert WEIGHTS in hub.files("user/branches", "refs/pr/1") and WEIGHTS not in hub.files("user/branches")


def test_what_was_to_be_private_is_not_put_into_a_public_repository(hub: LocalHub, tmp_path: Path) -> None:
    hub.add_repo("user/open", {"README.md": b"hello"})
    with pytest.raises(HubError, match="exists and is public"):
        push_cartridge(_folder(tmp_path), "user/open", private=True)
    assert set(hub.files("user/open")) == {"README.md"}


def test_a_model_is_pushed_by_its_own_method(hub: LocalHub) -> None:
    model = tiny_model()
    prefix = KVPrefix.from_input_ids(model, token_ids(10))
    facts = CardFacts(corpus_name="the handbook", metrics=[Metric("NLL", 1.5)])
    commit = cartridge_model(model, prefix).push_to_hub(
        "user/handbook", facts=facts, base_model="org/base", tags=["mine"], private=True
    )
    pushed = hub.files("user/handbook")
    assert commit.commit_url.endswith(hub.repos["user/handbook"].branches["main"])
    assert set(pushed) == FILES and hub.repos["user/handbook"].private
    assert torch.equal(load(pushed[WEIGHTS])["prompt_embeddings"], prefix.to_prompt_embeddings())
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert len(json.loads(pushed["cartridge.json"])["base_identity"]["weights_sha256"]) == 64
    card = ModelCard(pushed["README.md"].decode())
    assert "Cartridge of the handbook" in card.text and {"mine", *CARD_TAGS} <= set(card.data.tags)
    assert card.data.library_name == "peft"


def test_a_card_tells_the_size_in_the_models_dtype(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    config, prefix = read_cartridge(folder)
    assert prefix.dtype == torch.float32
    assert complete_facts(CardFacts(), config, prefix).kv_bytes == prefix.nbytes
    model = PeftModel.from_pretrained(tiny_model(dtype=torch.bfloat16), folder)
    assert complete_facts(CardFacts(), config, prefix, model).kv_bytes == prefix.nbytes // 2


def test_other_adapters_are_pushed_as_ever(hub: LocalHub) -> None:
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).push_to_hub("user/lora")
    assert WEIGHTS in hub.files("user/lora") and "cartridge.json" not in hub.files("user/lora")


def test_the_active_one_of_several_adapters_is_pushed_flat(hub: LocalHub, tmp_path: Path) -> None:
    folders = [saved(tmp_path / "a", seed=2), saved(tmp_path / "b", num_tokens=7, seed=3)]
    model = PeftModel.from_pretrained(tiny_model(), folders[0], adapter_name="a")
    model.load_adapter(folders[1], adapter_name="b")
    model.set_adapter("b")
    push_cartridge(model, "user/b", base_model="org/base")
    assert set(hub.files("user/b")) == FILES
    assert load(hub.files("user/b")[WEIGHTS])["prompt_embeddings"].shape[0] == 7


def test_a_card_that_someone_edited_is_kept(hub: LocalHub, tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    write_model_card(CardFacts(base_model="org/base"), folder)
    push_cartridge(folder, "user/generated")
    assert b'load_cartridge("user/generated")' in hub.files("user/generated")["README.md"]
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# My own words\n")
    push_cartridge(folder, "user/edited")
    assert hub.files("user/edited")["README.md"] == (folder / "README.md").read_bytes()


def test_a_base_model_that_nobody_else_can_find_is_asked_for(hub: LocalHub, tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    edit_config(folder, base_model_name_or_path="/home/someone/model")
    with pytest.raises(ValueError, match="`base_model='user/name'`"):
        push_cartridge(folder, "user/handbook")
    assert hub.requests == []
    push_cartridge(folder, "user/handbook", base_model="org/base")
    assert b"/home/someone" not in b"".join(hub.files("user/handbook").values())


def test_damaged_cartridges_are_not_pushed(hub: LocalHub, tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])
    with pytest.raises(ValueError, match="truncated or damaged"):
        push_cartridge(folder, "user/handbook")
    with pytest.raises(ValueError, match="without a cartridge"):
        push_cartridge(get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])), "user/handbook")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "does not accept the token"),
        (403, "may not do this"),
        (429, "fewer requests"),
        (500, "trouble of its own"),
    ],
)
def test_a_refused_push_is_one_line(status: int, message: str, hub: LocalHub, impatient: None, tmp_path: Path) -> None:
    with (
        hub.fault("POST /api/models/user/handbook/commit", status=status, times=99),
        pytest.raises(HubError, match=message) as caught,
    ):
        push_cartridge(_folder(tmp_path), "user/handbook")
    assert "\n" not in str(caught.value)
    assert set(hub.files("user/handbook")) == {".gitattributes"}


def test_someone_else_s_name_is_refused(hub: LocalHub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="The token may not do this to `other/handbook`"):
        push_cartridge(_folder(tmp_path), "other/handbook")
    with pytest.raises(ValueError, match="neither a folder nor a name on the Hub"):
        push_cartridge(_folder(tmp_path), "not a name")


def test_a_short_trouble_is_waited_out(hub: LocalHub, impatient: None, tmp_path: Path) -> None:
    with hub.fault("PUT /lfs/", status=503, times=2), hub.fault("preupload", status=429):
        push_cartridge(_folder(tmp_path), "user/handbook")
    assert WEIGHTS in hub.files("user/handbook")


def test_the_token_is_sent_and_never_shown_or_written(
    hub: LocalHub, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    folder = _folder(tmp_path)
    push = push_cartridge(folder, "user/handbook", token="hf_writer")
    with pytest.raises(HubError) as caught:
        push_cartridge(folder, "other/handbook", token="hf_writer")
    assert "Bearer hf_writer" in hub.authorizations
    output = capfd.readouterr()
    for shown in (output.out, output.err, caplog.text, str(push), repr(push), str(caught.value)):
        assert "hf_writer" not in shown
    written = [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_writer" in path.read_bytes()]
    assert written == [] and b"hf_writer" not in b"".join(hub.files("user/handbook").values())
