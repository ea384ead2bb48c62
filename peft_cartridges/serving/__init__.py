"""Cartridges on engines: vLLM, offline and as a server, and transformers' own server.

Imports neither trl, datasets nor the trainer; what needs vLLM is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .catalog import Catalog, Limits, Sources
    from .connector import CartridgeConnector
    from .offline import CartridgeLLM
    from .store import CartridgeStore, StoredCartridge

_MODULES = {
    "CartridgeConnector": "connector",
    "CartridgeLLM": "offline",
    "CartridgeStore": "store",
    "Catalog": "catalog",
    "Limits": "catalog",
    "Sources": "catalog",
    "StoredCartridge": "store",
}

__all__ = [
    "CartridgeConnector",
    "CartridgeLLM",
    "CartridgeStore",
    "Catalog",
    "Limits",
    "Sources",
    "StoredCartridge",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
