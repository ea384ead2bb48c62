"""Cartridges that nothing has trained: what each initialization is worth by itself."""

from __future__ import annotations

import time
from typing import Any

from peft import PeftModel, get_peft_model

from ...initialization import initialize_cartridge
from ...kv_prefix import KVPrefix
from ...tuner.config import CartridgeConfig
from ..system import NotApplicable, System, prefix_system
from .bench import Bench

_ADAPTER = "untrained"


def by_strategy(strategy: str, bench: Bench) -> System:
    """The cartridge that `initialize_cartridge` makes of the text.

    Raises:
        ValueError: there is no such strategy, or the text is too short for it.
    """
    return _system(bench, strategy.replace("_", " "), bench.text, strategy)


def unrelated_text(bench: Bench) -> System:
    """The first tokens of another text.

    Raises:
        NotApplicable: there is no other text, or it is too short.
    """
    if not bench.unrelated_text.strip():
        raise NotApplicable("no unrelated text is given")
    length = len(bench.codec.encode_context(bench.unrelated_text))
    if length < bench.num_tokens:
        raise NotApplicable(f"the unrelated text has {length} tokens, {bench.num_tokens} are needed")
    return _system(bench, "unrelated text", bench.unrelated_text, "first_tokens")


def _system(bench: Bench, name: str, text: str, strategy: str) -> System:
    start = time.perf_counter()
    prefix = _initialized(bench, text, strategy).detach()
    seconds = time.perf_counter() - start
    return prefix_system(f"untrained: {name}", bench.model, bench.codec, prefix, seconds=seconds)


def _initialized(bench: Bench, text: str, strategy: str) -> KVPrefix:
    """By an adapter that is gone again afterwards, beside those that the model has."""
    config = CartridgeConfig(num_tokens=bench.num_tokens)
    options: dict[str, Any] = {"text": text, "strategy": strategy, "adapter_name": _ADAPTER}
    if isinstance(bench.model, PeftModel):
        bench.model.add_adapter(_ADAPTER, config)
        try:
            return initialize_cartridge(bench.model, bench.codec, **options)
        finally:
            bench.model.delete_adapter(_ADAPTER)
    model = get_peft_model(bench.model, config, adapter_name=_ADAPTER)
    try:
        return initialize_cartridge(model, bench.codec, **options)
    finally:
        model.unload()
