"""Pulling with the real client: what is fetched, what is refused, and what is left behind when it breaks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import save

from peft_cartridges import HubError, pull_cartridge, push_cartridge
from peft_cartridges.adapter_folder import read_cartridge
from tests.exactness import assert_close
from tests.hub.local_hub import LocalHub
from tests.test_adapter_folder import CONFIG, WEIGHTS, edit_config, saved
from tests.tiny_models import tiny_model, token_ids

ROW = token_ids(1, 6, seed=1)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """The files of a good cartridge, large enough to be cut in the middle."""
    folder = saved(tmp_path / "source", num_tokens=64)
    edit_config(folder, base_model_name_or_path="org/base")
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS, "README.md")}


def _left_behind() -> list[str]:
    return [p.name for p in Path(constants.HF_HUB_CACHE).rglob("*") if p.name.endswith(".incomplete")]


def test_what_was_pushed_is_pulled_and_loads_by_name(hub: LocalHub, tmp_path: Path) -> None:
    folder = saved(tmp_path / "source")
    expected = PeftModel.from_pretrained(tiny_model(), folder).eval()(input_ids=ROW).logits
    push_cartridge(folder, "user/handbook", base_model="org/base")
    by_name = PeftModel.from_pretrained(tiny_model(), "user/handbook").eval()
    assert_close(by_name(input_ids=ROW).logits, expected, 1e-6)
    pulled = pull_cartridge("user/handbook", output_dir=tmp_path / "pulled")
    assert pulled == tmp_path / "pulled"
    assert {path.name for path in pulled.iterdir()} == {CONFIG, WEIGHTS, "README.md", "cartridge.json"}
    assert not any(path.is_symlink() for path in pulled.iterdir())
    assert_close(PeftModel.from_pretrained(tiny_model(), pulled).eval()(input_ids=ROW).logits, expected, 1e-6)
    with pytest.raises(ValueError, match="is not empty"):
        pull_cartridge("user/handbook", output_dir=tmp_path / "pulled")


def test_a_revision_is_a_branch_or_a_commit(hub: LocalHub, tmp_path: Path) -> None:
    folders = [saved(tmp_path / str(number), num_tokens=number) for number in (8, 9)]
    push_cartridge(folders[0], "user/handbook", base_model="org/base")
    push_cartridge(folders[1], "user/handbook", base_model="org/base", revision="v2")
    commit = hub.repos["user/handbook"].branches["v2"]
    lengths = {
        revision: read_cartridge(pull_cartridge("user/handbook", revision=revision))[1].num_tokens
        for revision in (None, "v2", commit)
    }
    assert lengths == {None: 8, "v2": 9, commit: 9}
    by_name = PeftModel.from_pretrained(tiny_model(), "user/handbook", revision="v2")
    assert by_name.peft_config["default"].num_tokens == 9
    with pytest.raises(HubError, match="has no revision `v3`"):
        pull_cartridge("user/handbook", revision="v3")


def test_only_the_files_of_a_cartridge_are_fetched(hub: LocalHub, files: dict[str, bytes]) -> None:
    others = ["modeling.py", "adapter_model.bin", "corpus.md", "code/x.py", "evil.png/../../x.png", "figure.png"]
    hub.add_repo("user/handbook", {**files, **dict.fromkeys(others, b"?")})
    folder = pull_cartridge("user/handbook")
    assert {path.name for path in folder.rglob("*")} == {CONFIG, WEIGHTS, "README.md", "figure.png"}
    fetched = {path.rpartition("/resolve/")[2].partition("/")[2] for _, path, _ in hub.requests if "/resolve/" in path}
    assert fetched == {CONFIG, WEIGHTS, "README.md", "figure.png"}


def test_names_that_climb_out_of_the_folder_are_never_asked_for(
    hub: LocalHub, files: dict[str, bytes], tmp_path: Path
) -> None:
    tricks = ["../../escaped.png", "/etc/escaped.png", "..\\..\\escaped.png", "a/../../escaped.png", "C:\\escaped.png"]
    hub.add_repo("user/handbook", {**files, **dict.fromkeys(tricks, b"out")})
    pull_cartridge("user/handbook", output_dir=tmp_path / "pulled")
    assert not list(tmp_path.rglob("*escaped*")) and not any("escaped" in path for _, path, _ in hub.requests)


def test_the_cache_serves_offline_and_nothing_is_fetched_twice(
    hub: LocalHub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("user/handbook", files)
    folder = pull_cartridge("user/handbook")
    number = len(hub.requests)
    assert pull_cartridge("user/handbook", local_files_only=True) == folder and len(hub.requests) == number
    assert pull_cartridge("user/handbook") == folder
    assert not any(method == "GET" and WEIGHTS in path for method, path, _ in hub.requests[number:])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    number = len(hub.requests)
    assert pull_cartridge("user/handbook") == folder and len(hub.requests) == number
    with pytest.raises(HubError, match=r"`user/other` is not in the cache.*HF_HUB_OFFLINE"):
        pull_cartridge("user/other")


def test_without_a_network_the_cache_serves_or_one_line_says_so(hub: LocalHub, files: dict[str, bytes]) -> None:
    hub.add_repo("user/handbook", files)
    folder = pull_cartridge("user/handbook")
    hub.close()
    assert pull_cartridge("user/handbook") == folder
    with pytest.raises(HubError, match=r"cannot be reached|cannot be asked") as caught:
        pull_cartridge("user/other")
    assert "\n" not in str(caught.value)


def test_a_cut_connection_is_taken_up_where_it_broke(
    hub: LocalHub, files: dict[str, bytes], impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # it goes on at the last whole chunk
    hub.add_repo("user/handbook", files)
    with hub.fault(f"GET .*{WEIGHTS}", cut_after=5000):
        folder = pull_cartridge("user/handbook")
    assert (folder / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert hub.ranges == ["bytes=5000-"]


def test_a_connection_that_stays_cut_leaves_nothing_half_written(
    hub: LocalHub, files: dict[str, bytes], impatient: None, tmp_path: Path
) -> None:
    hub.add_repo("user/handbook", files)
    with hub.fault(f"GET .*{WEIGHTS}", cut_after=0, times=99), pytest.raises(HubError) as caught:
        pull_cartridge("user/handbook", output_dir=tmp_path / "pulled")
    assert "\n" not in str(caught.value)
    assert _left_behind() == [] and not (tmp_path / "pulled").exists()
    assert not list(Path(constants.HF_HUB_CACHE).rglob(WEIGHTS))
    pull_cartridge("user/handbook", output_dir=tmp_path / "pulled")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "does not accept the token"),
        (403, "may not do this"),
        (404, "refuses the request"),
        (429, "fewer requests"),
        (500, "trouble of its own"),
    ],
)
def test_a_refused_pull_is_one_line(status: int, message: str, hub: LocalHub, files: Any, impatient: None) -> None:
    hub.add_repo("user/handbook", files)
    with hub.fault("/user/handbook", status=status, times=999), pytest.raises(HubError, match=message) as caught:
        pull_cartridge("user/handbook")
    assert "\n" not in str(caught.value) and "hf_" not in str(caught.value)


def test_missing_private_and_gated_repositories(
    hub: LocalHub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("other/private", files, private=True)
    hub.add_repo("other/gated", files, gated=True)
    for name in ("other/missing", "other/private"):
        with pytest.raises(HubError, match=f"There is no `{name}` at http://127.*hf auth login"):
            pull_cartridge(name)
    with pytest.raises(HubError, match="`other/gated` is gated: ask for access"):
        pull_cartridge("other/gated")
    with pytest.raises(HubError, match="does not accept the token"):
        pull_cartridge("other/private", token="hf_wrong")
    hub.add_repo("user/private", files, private=True)
    assert pull_cartridge("user/private").is_dir()
    with pytest.raises(ValueError, match="neither a folder nor a name"):
        pull_cartridge("not a name")


def test_repositories_that_are_no_sound_cartridge(hub: LocalHub, files: dict[str, bytes]) -> None:
    config = json.loads(files[CONFIG])
    nan = torch.full((64, 64), torch.nan)
    for name, change, error, message in [
        ("empty", None, FileNotFoundError, "is no cartridge: it has no adapter_config.json"),
        ("pickled", {WEIGHTS: None, "adapter_model.bin": b"cos\nsystem\n"}, ValueError, "pickled weights only"),
        ("half", {WEIGHTS: None}, FileNotFoundError, "no complete cartridge"),
        ("lora", {CONFIG: json.dumps({"peft_type": "LORA"}).encode()}, ValueError, "peft_type 'LORA'"),
        ("truncated", {WEIGHTS: files[WEIGHTS][:-100]}, ValueError, "truncated or damaged"),
        ("shape", {CONFIG: json.dumps({**config, "num_virtual_tokens": 65}).encode()}, ValueError, "shape"),
        ("nan", {WEIGHTS: save({"prompt_embeddings": nan})}, ValueError, "NaN or infinite"),
        (
            "fp8",
            {CONFIG: json.dumps({**config, "quantization": "fp8"}).encode()},
            ValueError,
            "no tensor `layers.0.key",
        ),
    ]:
        changed = {} if change is None else {**files, **change}
        hub.add_repo(f"user/{name}", {path: data for path, data in changed.items() if data is not None} or {"a": b""})
        with pytest.raises(error, match=message) as caught:  # type: ignore[call-overload]
            pull_cartridge(f"user/{name}")
        assert "\n" not in str(caught.value), name
    requested = [path for _, path, _ in hub.requests if path.endswith(".bin")]
    assert requested == []


def test_a_cartridge_that_is_too_large_is_refused_before_it_is_fetched(hub: LocalHub, files: Any) -> None:
    hub.add_repo("user/handbook", files)
    with pytest.raises(ValueError, match=r"more than `max_bytes` \(1,000\)"):
        pull_cartridge("user/handbook", max_bytes=1000)
    assert not any("/resolve/" in path for _, path, _ in hub.requests)


def test_a_folder_that_cannot_be_made_leaves_no_staging(hub: LocalHub, files: Any, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    hub.add_repo("user/handbook", files)

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(OSError, match="disk full"):
        pull_cartridge("user/handbook", output_dir=tmp_path / "out" / "pulled")
    assert list((tmp_path / "out").iterdir()) == []
