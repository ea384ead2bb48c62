"""What `cartridges serve` is told, whichever engine answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .catalog import Sources


@dataclass
class ServerSettings:
    """Args:
    base: The base model: its name on the Hub, or its folder.
    cartridges: From the name of each to its folder, or its name on the Hub (`user/name@revision`).
    store: Folder of checked copies; a temporary one where it is None.
    host_bytes: How many bytes of cartridges each worker keeps in host memory.
    max_cartridges: How many there may be, compositions included.
    max_bytes: How many bytes they may have together.
    load_seconds: How long one that is loaded at run time may take.
    sources: Where such a one may come from.
    tenants: A file of tenants (see `read_tenants`).
    gate: Whether requests that a cartridge's gate rejects are answered by the base model.
    admin_key: The key of who may load and unload; None leaves those endpoints out.
    """

    base: str
    cartridges: dict[str, str] = field(default_factory=dict)
    store: Path | None = None
    host_bytes: int = 4 << 30
    max_cartridges: int = 1024
    max_bytes: int = 64 << 30
    load_seconds: float = 300.0
    sources: Sources = field(default_factory=Sources)
    tenants: Path | None = None
    gate: bool = True
    admin_key: str | None = None
