"""The store: cartridges as an engine reads them, one checked file each, named by its own content.

Whoever starts a server fills it; requests and engine processes name a cartridge by its digest only, so nothing that a
request says becomes a path. A file is a copy: what was checked is what is served, whatever happens to the original.
Processes on several machines share a store through a common file system.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..kv_prefix import KVPrefix

DIGEST = re.compile(r"[0-9a-f]{64}")
_FORMAT = "1"


@dataclass(frozen=True)
class StoredCartridge:
    """A cartridge in a store.

    Args:
        digest: SHA-256 of its keys and values: two cartridges, or two revisions of one, never share it.
        num_tokens: Its length.
        layers: Of the model's layers, those that hold a part of it.
        nbytes: Size of all its keys and values in the store.
    """

    digest: str
    num_tokens: int
    layers: tuple[int, ...]
    nbytes: int

    def placeholder_ids(self, alphabet: Sequence[int]) -> list[int]:
        """`num_tokens` token ids that stand for the cartridge at the beginning of a prompt. They spell its digest in
        the letters of `alphabet`, so that an engine's prefix cache tells cartridges apart; no model ever reads them."""
        base, letters = len(alphabet), []
        for counter in range(-(-self.num_tokens // 128)):
            number = int.from_bytes(hashlib.sha256(f"{self.digest}:{counter}".encode()).digest(), "big")
            for _ in range(128):
                number, digit = divmod(number, base)
                letters.append(alphabet[digit])
        return letters[: self.num_tokens]


class CartridgeStore:
    """A folder of checked cartridges.

    Args:
        folder: Where it is; made if it is missing, readable by its owner only.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def add(self, prefix: KVPrefix, layers: Sequence[int] | None = None) -> StoredCartridge:
        """Puts a cartridge in, if it is not there already.

        Args:
            prefix: Its keys and values.
            layers: For each of the prefix's layers, which layer of the model it belongs to; default: the first ones.
        """
        layers = tuple(range(prefix.num_layers) if layers is None else layers)
        tensors: dict[str, Tensor] = {}
        for layer, key, value in zip(layers, prefix.keys, prefix.values, strict=True):
            tensors[f"layers.{layer}.key"] = key.detach().cpu().contiguous()
            tensors[f"layers.{layer}.value"] = value.detach().cpu().contiguous()
        stored = StoredCartridge(_digest(tensors), prefix.num_tokens, layers, prefix.nbytes)
        path = self.path(stored.digest)
        if not path.exists():
            metadata = {"format": _FORMAT, "num_tokens": str(stored.num_tokens), "layers": json.dumps(layers)}
            handle, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=self.folder)
            os.close(handle)
            try:
                save_file(tensors, temporary, metadata=metadata)
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise
        return stored

    def path(self, digest: str) -> Path:
        """Raises:
        ValueError: `digest` is none (and so cannot become a path elsewhere).
        """
        if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
            raise ValueError(f"{digest!r} is no digest of a cartridge.")
        return self.folder / f"{digest}.safetensors"

    def get(self, digest: str) -> StoredCartridge:
        """Raises:
        ValueError: `digest` is none, or the file is damaged.
        FileNotFoundError: the store has no such cartridge.
        """
        path = self.path(digest)
        if not path.is_file():
            raise FileNotFoundError(f"The store {self.folder} has no cartridge {digest}.")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = file.metadata()
                if metadata["format"] != _FORMAT:
                    raise ValueError(f"{path} has format {metadata['format']}, this version reads {_FORMAT}.")
                return StoredCartridge(
                    digest, int(metadata["num_tokens"]), tuple(json.loads(metadata["layers"])), path.stat().st_size
                )
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it and start again.") from error

    def read_prefix(self, stored: StoredCartridge) -> KVPrefix:
        """All of a cartridge again, as `add` got it."""
        layers = self.read_layers(stored.digest, stored.layers)
        pairs = [layers[index] for index in stored.layers]
        return KVPrefix(
            tuple(key.transpose(0, 1).contiguous() for key, _ in pairs),
            tuple(value.transpose(0, 1).contiguous() for _, value in pairs),
        )

    def read_layers(
        self, digest: str, layers: Sequence[int], *, rank: int = 0, world_size: int = 1
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values `[num_tokens, heads, dim]` of some layers, of the heads of one tensor-parallel rank.

        Raises:
            ValueError, FileNotFoundError: as `get`, or a layer is missing.
        """
        path, found = self.path(digest), {}
        if not path.is_file():
            raise FileNotFoundError(f"The store {self.folder} has no cartridge {digest}.")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for layer in layers:
                    parts = [file.get_slice(f"layers.{layer}.{part}") for part in ("key", "value")]
                    heads = heads_of_rank(parts[0].get_shape()[0], rank, world_size)
                    key, value = (part[heads].transpose(0, 1).contiguous() for part in parts)
                    found[layer] = (key, value)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or lacks layer {layer} ({error}).") from error
        return found

    def remove(self, digest: str) -> None:
        """Takes a cartridge out; nothing happens if it is not there."""
        self.path(digest).unlink(missing_ok=True)


def heads_of_rank(num_heads: int, rank: int, world_size: int) -> slice:
    """The key/value heads of a tensor-parallel rank, as engines deal them out: in order, and each to several ranks
    where there are fewer heads than ranks.

    Raises:
        ValueError: neither number is a multiple of the other.
    """
    if num_heads % world_size and world_size % num_heads:
        raise ValueError(f"{num_heads} key/value heads cannot be dealt to {world_size} ranks.")
    start = rank * num_heads // world_size
    return slice(start, start + max(1, num_heads // world_size))


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
