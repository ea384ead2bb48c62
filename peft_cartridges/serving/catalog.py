"""The catalog: which names a server serves, to whom, and where they come from.

Everything that may go wrong with a cartridge goes wrong here, before an engine hears of it: sources that are not
allowed, files that are damaged or too large, another base model, a name that is taken.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapter_folder import WEIGHTS_FILE, read_cartridge
from ..composition import NamedCartridge, join_cartridges
from ..gate import Gate, load_gate
from ..hub import pull_cartridge
from ..hub.model_card import is_hub_name
from ..tuner.config import CartridgeConfig
from .base_model import BaseModelFacts
from .store import CartridgeStore, StoredCartridge

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,127}")
JOIN = "+"
_MOST_PARTS = 16


@dataclass(frozen=True)
class Limits:
    """What a server takes at most.

    Args:
        num_tokens: Tokens of one cartridge; it must leave room for a prompt in the engine's context.
        cartridges: Cartridges, compositions included.
        nbytes: Bytes of all of them.
        seconds: For fetching and checking one that is loaded at run time.
    """

    num_tokens: int
    cartridges: int = 1024
    nbytes: int = 64 << 30
    seconds: float = 300.0


@dataclass(eq=False)
class Entry:
    """A cartridge that is served under a name.

    Args:
        gates: Its gate, or those of a composition's parts; empty where it takes all requests.
        decisions: How many requests the gates accepted and rejected.
    """

    name: str
    source: str
    stored: StoredCartridge
    config: CartridgeConfig
    chat_template: str | None
    gates: tuple[Gate, ...] = ()
    decisions: dict[str, int] = field(default_factory=lambda: {"accepted": 0, "rejected": 0})
    created: int = field(default_factory=lambda: int(time.time()))
    requests: int = 0  # that are being answered now
    removed: bool = False

    def describe(self) -> dict[str, Any]:
        """What `GET /v1/cartridges` tells of it."""
        return {
            "id": self.name,
            "object": "cartridge",
            "created": self.created,
            "num_tokens": self.stored.num_tokens,
            "bytes": self.stored.nbytes,
            "sha256": self.stored.digest,
            "gate": dict(self.decisions) if self.gates else None,
        }


@dataclass(frozen=True)
class Sources:
    """Where cartridges may be loaded from while a server runs; nowhere, unless it says so.

    Args:
        roots: Folders, and whatever lies below them.
        namespaces: Users and organizations of the Hub.
    """

    roots: tuple[Path, ...] = ()
    namespaces: tuple[str, ...] = ()

    def check(self, source: str) -> None:
        """Raises:
        PermissionError: `source` lies elsewhere (links and `..` are followed first).
        """
        namespace, slash, _ = source.partition("/")
        if slash and is_hub_name(source) and not Path(source).exists() and namespace in self.namespaces:
            return
        path = Path(source).resolve()
        if any(path.is_relative_to(root.resolve()) and path != root.resolve() for root in self.roots):
            return
        raise PermissionError(
            f"{source!r} lies under no folder (`--cartridge-root`) or namespace of the Hub (`--cartridge-namespace`) "
            "that this server may load from."
        )


class Catalog:
    """Names and their cartridges. All methods may be called from several threads.

    Args:
        store: Where checked cartridges go.
        base: The base model that they must belong to.
        limits: How many and how large.
    """

    def __init__(self, store: CartridgeStore, base: BaseModelFacts, limits: Limits) -> None:
        self.store, self.base, self.limits = store, base, limits
        self._entries: dict[str, Entry] = {}
        self._compositions: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.RLock()

    # -- what is there -----------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """The cartridges by name; compositions, which are made as they are asked for, are not among them."""
        with self._lock:
            return list(self._entries.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all cartridges, each content once."""
        with self._lock:
            held = [*self._entries.values(), *self._compositions.values()]
        return sum({entry.stored.digest: entry.stored.nbytes for entry in held}.values())

    def find(self, name: str, allowed: Collection[str] | None = None) -> Entry | None:
        """The cartridge of a name, or the composition of an `a+b`; None where there is none, or where one of its
        parts is not among the `allowed` ones.

        Raises:
            ValueError: the parts of a composition do not go together, or are too long together.
        """
        parts = name.split(JOIN)
        if len(parts) > _MOST_PARTS or (allowed is not None and not set(parts) <= set(allowed)):
            return None
        with self._lock:
            entries = [self._entries[part] for part in parts if part in self._entries]
            if len(entries) < len(parts):
                return None
            return entries[0] if len(parts) == 1 else self._composition(name, entries)

    # -- change ------------------------------------------------------------------------------------------------------

    def load(
        self,
        name: str,
        source: str,
        *,
        revision: str | None = None,
        replace: bool = False,
        abandoned: threading.Event | None = None,
    ) -> Entry:
        """Fetches, checks and names a cartridge.

        Args:
            name: What requests call it.
            source: Its folder, or its name on the Hub.
            revision: Branch, tag or commit on the Hub.
            replace: Whether a cartridge of this name may give way. Requests on the way keep the old one.
            abandoned: Set by who does not wait any longer: then nothing changes.

        Raises:
            TimeoutError: it was abandoned.
            ValueError: the name, the files, the base model or a limit; the message says which.
            FileNotFoundError, HubError: there is no such cartridge.
        """
        if not NAME.fullmatch(name) or name == self.base.name:
            raise ValueError(
                f"`name` is {name!r}: letters, digits and _ . : / - (no {JOIN}, which joins names), and not the base "
                "model's."
            )
        if not replace and name in self._entries:
            raise ValueError(f"There is a cartridge {name!r} already: unload it first, or choose another name.")
        folder = self._fetch(source, revision)
        config, prefix = read_cartridge(folder)
        self._check(name, config, folder)
        stored = self.store.add(prefix, _model_layers(config))
        gate = load_gate(folder)
        entry = Entry(
            name, f"{source}@{revision}" if revision else source, stored, config, self.base.chat_template(folder),
            () if gate is None else (gate,),
        )  # fmt: skip
        with self._lock:
            if abandoned is not None and abandoned.is_set():
                self._discard(entry)
                raise TimeoutError(f"{source!r} took too long to load.")
            if not replace and name in self._entries:
                raise ValueError(f"There is a cartridge {name!r} already.")
            old = self._entries.pop(name, None)
            try:
                self._make_room(entry)
            except ValueError:
                if old is not None:
                    self._entries[name] = old
                self._discard(entry)
                raise
            self._entries[name] = entry
            self._forget(name, old)
        return entry

    def unload(self, name: str) -> None:
        """Takes a name out, and the compositions that it is part of. Requests on the way are answered.

        Raises:
            KeyError: there is no such name.
        """
        with self._lock:
            self._forget(name, self._entries.pop(name))

    def begin(self, entry: Entry) -> None:
        """A request is being answered with this cartridge: its file stays until `end`."""
        with self._lock:
            entry.requests += 1

    def end(self, entry: Entry) -> None:
        with self._lock:
            entry.requests -= 1
            if entry.removed:
                self._discard(entry)

    # -- within ------------------------------------------------------------------------------------------------------

    def _fetch(self, source: str, revision: str | None) -> Path:
        if Path(source).is_dir():
            if revision is not None:
                raise ValueError(f"{source!r} is a folder, which has no revisions: leave out {revision!r}.")
            folder = Path(source)
        elif is_hub_name(source):
            folder = pull_cartridge(source, revision=revision, max_bytes=self.limits.nbytes)
        else:
            raise FileNotFoundError(f"{source!r} is neither a folder nor a name on the Hub (`user/name`).")
        weights = folder / WEIGHTS_FILE
        if weights.is_file() and weights.stat().st_size > self.limits.nbytes:
            raise ValueError(f"{weights} is larger than all cartridges may be ({self.limits.nbytes:,} bytes).")
        return folder

    def _check(self, name: str, config: CartridgeConfig, folder: Path) -> None:
        if config.modules_to_save:
            raise ValueError(f"Cartridge {name!r} carries whole modules (`modules_to_save`), which cannot be served.")
        if config.sliding_window == "pinned":
            raise ValueError(
                f"Cartridge {name!r} stays visible in sliding windows (`sliding_window='pinned'`), which no engine can "
                "do: train it with 'windowed'."
            )
        if config.layer_states is not None:
            raise ValueError(
                f"Cartridge {name!r} holds states of recurrent layers (`layer_states`), which cannot be served: use it in "
                'Python (`load_cartridge`), or train it with `recurrent_state="skip"`.'
            )
        self._check_length(name, config.num_tokens or 0)
        for doubt in self.base.check(folder):
            logger.warning("%s", doubt)

    def _check_length(self, name: str, num_tokens: int) -> None:
        if num_tokens > self.limits.num_tokens:
            raise ValueError(
                f"Cartridge {name!r} has {num_tokens:,} tokens, and this server's context has room for "
                f"{self.limits.num_tokens:,} and a prompt: raise `--max-model-len`."
            )

    def _composition(self, name: str, parts: Sequence[Entry]) -> Entry:
        if name in self._compositions:
            self._compositions.move_to_end(name)
            return self._compositions[name]
        self._check_length(name, sum(part.stored.num_tokens for part in parts))
        named = [NamedCartridge(part.name, part.config, self.store.read_prefix(part.stored)) for part in parts]
        config, prefix = join_cartridges(named, base_model=self.base.name)
        templates = {part.chat_template for part in parts}
        if len(templates) > 1:
            raise ValueError(f"The parts of {name!r} were trained behind different chat templates.")
        stored = self.store.add(prefix, parts[0].stored.layers)
        gates = [part.gates for part in parts]
        entry = Entry(name, name, stored, config, templates.pop(), sum(gates, ()) if all(gates) else ())
        try:
            self._make_room(entry)
        except ValueError:
            self._discard(entry)
            raise
        self._compositions[name] = entry
        return entry

    def _make_room(self, entry: Entry) -> None:
        """Compositions that nobody uses now give way, least recently used ones first."""
        while True:
            count = len(self._entries) + len(self._compositions) + 1
            if count <= self.limits.cartridges and self.nbytes + entry.stored.nbytes <= self.limits.nbytes:
                return
            idle = next((one for one in self._compositions.values() if not one.requests), None)
            if idle is None:
                raise ValueError(
                    f"{entry.name!r} would be cartridge {count} of at most {self.limits.cartridges}, with "
                    f"{self.nbytes + entry.stored.nbytes:,} of at most {self.limits.nbytes:,} bytes: unload others, or "
                    "raise `--max-cartridges` or `--max-cartridge-bytes`."
                )
            self._remove(self._compositions.pop(idle.name))

    def _forget(self, name: str, old: Entry | None) -> None:
        for composition in [one for one in self._compositions if name in one.split(JOIN)]:
            self._remove(self._compositions.pop(composition))
        if old is not None:
            self._remove(old)

    def _remove(self, entry: Entry) -> None:
        entry.removed = True
        self._discard(entry)

    def _discard(self, entry: Entry) -> None:
        """The file goes when no name and no request needs its content any more."""
        held = [*self._entries.values(), *self._compositions.values()]
        if not entry.requests and all(one.stored.digest != entry.stored.digest for one in held):
            self.store.remove(entry.stored.digest)


def _model_layers(config: CartridgeConfig) -> list[int] | None:
    if config.layer_shapes is None:
        return None
    return [index for index, shape in enumerate(config.layer_shapes) if shape is not None]


def split_revision(source: str) -> tuple[str, str | None]:
    """`user/name@revision` in two; a folder that is there stays whole."""
    if Path(source).exists():
        return source, None
    name, _, revision = source.partition("@")
    return name, revision or None
