"""The store keeps what was checked, and a digest is all that a request can name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peft_cartridges import KVPrefix
from peft_cartridges.serving.store import CartridgeStore, heads_of_rank


def prefix(num_tokens: int = 10, seed: int = 0, heads: int = 4) -> KVPrefix:
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(heads, num_tokens, 8, generator=generator) for _ in range(6)]
    return KVPrefix(tuple(layers[:3]), tuple(layers[3:]))


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    store, one = CartridgeStore(tmp_path), prefix()
    stored = store.add(one, layers=[0, 2, 5])
    assert (stored.num_tokens, stored.layers, stored.nbytes) == (10, (0, 2, 5), one.nbytes)
    again = store.read_prefix(CartridgeStore(tmp_path).get(stored.digest))
    assert all(torch.equal(a, b) for a, b in zip((*one.keys, *one.values), (*again.keys, *again.values), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == [f"{stored.digest}.safetensors"]
    assert store.add(one, layers=[0, 2, 5]) == stored


def test_every_content_has_a_digest_and_placeholders_of_its_own(tmp_path: Path) -> None:
    store = CartridgeStore(tmp_path)
    changed = prefix()
    changed.values[2][3, 9, 7] += 1e-6
    stored = [store.add(one) for one in (prefix(300), prefix(300, seed=1), prefix(), changed)]
    stored.append(store.add(prefix(), layers=[0, 1, 3]))
    assert len({one.digest for one in stored}) == 5
    ids = [tuple(one.placeholder_ids([7, 9])) for one in stored]
    assert [len(one) for one in ids] == [300, 300, 10, 10, 10] and {*ids[0]} == {7, 9}
    assert ids[0][:128] != ids[1][:128] and ids[0][:128] != ids[0][128:256]


@pytest.mark.parametrize("digest", ["../../etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "\n", "", None, 7])
def test_only_digests_are_names(tmp_path: Path, digest: str) -> None:
    for ask in (CartridgeStore(tmp_path).get, CartridgeStore(tmp_path).remove):
        with pytest.raises(ValueError, match="no digest"):
            ask(digest)


def test_what_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    store = CartridgeStore(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no cartridge"):
        store.get("a" * 64)
    stored = store.add(prefix())
    with pytest.raises(ValueError, match="lacks layer 3"):
        store.read_layers(stored.digest, [3])
    path = store.path(stored.digest)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        store.get(stored.digest)


@pytest.mark.parametrize(("heads", "world_size"), [(4, 1), (4, 2), (4, 4), (2, 4), (1, 8)])
def test_ranks_have_the_heads_that_engines_deal_out(tmp_path: Path, heads: int, world_size: int) -> None:
    """As vLLM cuts the rows of a key projection: equal parts in order, or copies where there are more ranks."""
    store, whole = CartridgeStore(tmp_path), prefix(heads=heads)
    digest = store.add(whole).digest
    rows = whole.keys[1].repeat_interleave(max(1, world_size // heads), dim=0).chunk(world_size)
    for rank in range(world_size):
        key, _ = store.read_layers(digest, [1], rank=rank, world_size=world_size)[1]
        assert torch.equal(key.transpose(0, 1), rows[rank])
    with pytest.raises(ValueError, match="cannot be dealt"):
        heads_of_rank(3, 0, 2)
