"""The catalog: names, limits, compositions, and what of the store stays for how long."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from peft_cartridges.adapter_folder import read_cartridge
from peft_cartridges.composition import NamedCartridge, join_cartridges
from peft_cartridges.serving.base_model import BaseModelFacts
from peft_cartridges.serving.catalog import Catalog, Limits, Sources, split_revision
from peft_cartridges.serving.store import CartridgeStore
from tests.serving.models import SHAPES, save_base, save_cartridge
from tests.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalog")
    save_base(folder / "base")
    for name, length in {"a": 20, "b": 30, "c": 40}.items():
        model = tiny_model("llama", **SHAPES["llama"])
        save_cartridge(folder / name, model, length, seed=length, base=str(folder / "base"))
    return folder


@pytest.fixture
def catalog(folder: Path, tmp_path: Path) -> Catalog:
    catalog = Catalog(CartridgeStore(tmp_path), BaseModelFacts(str(folder / "base")), Limits(100, cartridges=4))
    for name in "abc":
        catalog.load(name, str(folder / name))
    return catalog


def files(catalog: Catalog) -> set[str]:
    return {path.stem for path in catalog.store.folder.iterdir()}


def test_names_and_compositions(catalog: Catalog, folder: Path) -> None:
    one, joined = catalog.find("a"), catalog.find("a+b")
    assert one is not None and one.stored.num_tokens == 20 and joined is not None
    parts = [NamedCartridge(name, *read_cartridge(folder / name)) for name in "ab"]
    _, expected = join_cartridges(parts)
    found = catalog.store.read_prefix(joined.stored)
    assert all(torch.equal(*pair) for pair in zip(found.keys, expected.keys, strict=True))
    assert catalog.find("a+b") is joined
    assert [entry.name for entry in catalog.entries()] == ["a", "b", "c"]
    for name in ("d", "a+d", "", "+", "a+", "a++b", "../a", "+".join("a" * 17)):
        assert catalog.find(name) is None, name
    with pytest.raises(ValueError, match=r"'c\+c\+c' has 120 tokens"):
        catalog.find("c+c+c")


def test_only_what_is_allowed_is_found(catalog: Catalog) -> None:
    assert catalog.find("a", {"a", "b"}) and catalog.find("a+b", {"a", "b"})
    assert catalog.find("c", {"a", "b"}) is None and catalog.find("a+c", {"a", "b"}) is None
    assert catalog.find("a", ()) is None


def test_compositions_give_way_and_named_ones_do_not(catalog: Catalog, folder: Path) -> None:
    first = catalog.find("a+b")
    assert first is not None and len(files(catalog)) == 4
    second = catalog.find("b+a")  # the fourth and last place
    assert second is not None and first.removed and first.stored.digest not in files(catalog)
    catalog.begin(second)
    with pytest.raises(ValueError, match="at most 4"):
        catalog.find("a+c")
    assert len(files(catalog)) == 4
    catalog.end(second)
    assert catalog.find("a+c") is not None and second.stored.digest not in files(catalog)


def test_a_file_stays_as_long_as_a_request_needs_it(catalog: Catalog, folder: Path) -> None:
    entry = catalog.find("a")
    assert entry is not None
    catalog.begin(entry)
    catalog.unload("a")
    assert catalog.find("a") is None and entry.stored.digest in files(catalog)
    catalog.end(entry)
    assert entry.stored.digest not in files(catalog)
    with pytest.raises(KeyError):
        catalog.unload("a")
    # Two names of one content: the file goes with the last.
    catalog.load("twin", str(folder / "b"))
    twin = catalog.find("twin")
    assert twin is not None
    catalog.unload("b")
    assert twin.stored.digest in files(catalog)
    catalog.unload("twin")
    assert twin.stored.digest not in files(catalog)


def test_replacing(catalog: Catalog, folder: Path) -> None:
    old, joined = catalog.find("a"), catalog.find("a+b")
    assert old is not None and joined is not None
    with pytest.raises(ValueError, match="already"):
        catalog.load("a", str(folder / "c"))
    new = catalog.load("a", str(folder / "c"), replace=True)
    again = catalog.find("a+b")
    assert new.stored.num_tokens == 40 and again is not None and again.stored.digest != joined.stored.digest
    assert old.stored.digest not in files(catalog)


def test_a_load_that_nobody_waits_for_changes_nothing(catalog: Catalog, folder: Path) -> None:
    before, abandoned = files(catalog), threading.Event()
    assert catalog.load("a", str(folder / "a"), replace=True, abandoned=abandoned).name == "a"
    entries = catalog.entries()
    abandoned.set()
    new = save_cartridge(folder / "new", tiny_model("llama", **SHAPES["llama"]), 33, seed=33, base=str(folder / "base"))
    with pytest.raises(TimeoutError):
        catalog.load("a", str(new), replace=True, abandoned=abandoned)
    assert catalog.entries() == entries and files(catalog) == before


def test_what_cannot_be_served(catalog: Catalog, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = files(catalog)
    long = save_cartridge(
        tmp_path_factory.mktemp("long"), tiny_model("llama", **SHAPES["llama"]), 101, seed=1, base=str(folder / "base")
    )
    with pytest.raises(ValueError, match="has 101 tokens, and this server's context has room for 100"):
        catalog.load("d", str(long))
    other = tiny_model("llama", **{**SHAPES["llama"], "num_key_value_heads": 4})
    with pytest.raises(ValueError, match="another base model"):
        catalog.load("d", str(save_cartridge(tmp_path_factory.mktemp("heads"), other, 10, seed=1)))
    for name in ("a+b", "../d", "", "x" * 129, str(folder / "base")):
        with pytest.raises(ValueError, match="`name` is"):
            catalog.load(name, str(folder / "a"))
    with pytest.raises(FileNotFoundError):
        catalog.load("d", str(folder / "nothing"))
    with pytest.raises(ValueError, match="has no revisions"):
        catalog.load("d", str(folder / "a"), revision="v2")
    assert files(catalog) == before


def test_bytes_have_a_limit(folder: Path, tmp_path: Path) -> None:
    base = BaseModelFacts(str(folder / "base"))
    size = read_cartridge(folder / "a")[1].nbytes
    catalog = Catalog(CartridgeStore(tmp_path), base, Limits(100, nbytes=2 * size))
    catalog.load("a", str(folder / "a"))
    with pytest.raises(ValueError, match="of at most"):
        catalog.load("b", str(folder / "b"))
    assert len(files(catalog)) == 1
    catalog.load("twin", str(folder / "a"))  # the same content is there once
    tight = Catalog(CartridgeStore(tmp_path / "tight"), base, Limits(100, nbytes=size // 2))
    with pytest.raises(ValueError, match="larger than all cartridges may be"):
        tight.load("a", str(folder / "a"))


def test_sources(tmp_path: Path) -> None:
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "rooted").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "rooted")
    sources = Sources((tmp_path / "root",), ("acme",))
    sources.check(str(tmp_path / "root" / "a"))
    sources.check("acme/handbook")
    for source in ("root", "root/..", "rooted", "root/link", "root/../rooted", "root/a/../../rooted"):
        with pytest.raises(PermissionError):
            sources.check(str(tmp_path / source))
    for source in ("other/handbook", "acme", "acme/../x", "/acme/handbook"):
        with pytest.raises(PermissionError):
            sources.check(source)
    with pytest.raises(PermissionError, match="--cartridge-root"):
        Sources().check("acme/handbook")


def test_revisions(tmp_path: Path) -> None:
    (tmp_path / "a@b").mkdir()
    assert split_revision(str(tmp_path / "a@b")) == (str(tmp_path / "a@b"), None)
    assert split_revision("user/a@v2") == ("user/a", "v2") and split_revision("user/a") == ("user/a", None)


def test_placeholders_are_tokens_that_no_answer_has(folder: Path) -> None:
    base = BaseModelFacts(str(folder / "base"))
    alphabet = base.placeholder_alphabet()
    tokenizer = tiny_tokenizer()
    assert len(set(alphabet)) == 2 and max(alphabet) < base.config.vocab_size
    assert not set(alphabet) & {tokenizer.eos_token_id, tokenizer.bos_token_id}
