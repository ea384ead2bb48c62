"""Cartridges: small trained KV caches that stand in for a long text, as a PEFT adapter type.

Importing this package registers the adapter type with PEFT and nothing heavier: names that need trl or datasets are
imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import quiet as _quiet

if _quiet.is_command():
    _quiet.quiet_libraries()

from . import peft_model as _registration  # noqa: F401
from .tuner import CartridgeConfig, CartridgeModel

if TYPE_CHECKING:
    from .adapter_folder import quantize_cartridge
    from .attention import UnsupportedModelError, shared_prefix
    from .chat import ChatCodec, cartridge_chat_template
    from .conversations import load_self_study
    from .evaluation import EvaluationConfig, evaluate_cartridge, gold_answer_nll
    from .gate import Gate
    from .hub import (
        HubError,
        check_base_model,
        compose,
        list_cartridges,
        load_cartridge,
        pull_cartridge,
        push_cartridge,
    )
    from .initialization import initialize_cartridge
    from .kv_prefix import KVPrefix
    from .self_study import SelfStudySynthesizer, SynthesisConfig
    from .trainer import SelfStudyConfig, SelfStudyTrainer

__version__ = "0.1.0"

_LAZY = {
    "EvaluationConfig": "evaluation",
    "Gate": "gate",
    "HubError": "hub",
    "KVPrefix": "kv_prefix",
    "SelfStudyConfig": "trainer",
    "SelfStudySynthesizer": "self_study",
    "SelfStudyTrainer": "trainer",
    "SynthesisConfig": "self_study",
    "UnsupportedModelError": "attention",
    "ChatCodec": "chat",
    "cartridge_chat_template": "chat",
    "check_base_model": "hub",
    "compose": "hub",
    "evaluate_cartridge": "evaluation",
    "gold_answer_nll": "evaluation",
    "initialize_cartridge": "initialization",
    "list_cartridges": "hub",
    "load_cartridge": "hub",
    "load_self_study": "conversations",
    "pull_cartridge": "hub",
    "push_cartridge": "hub",
    "quantize_cartridge": "adapter_folder",
    "shared_prefix": "attention",
}

__all__ = [
    "CartridgeConfig",
    "CartridgeModel",
    "ChatCodec",
    "EvaluationConfig",
    "Gate",
    "HubError",
    "KVPrefix",
    "SelfStudyConfig",
    "SelfStudySynthesizer",
    "SelfStudyTrainer",
    "SynthesisConfig",
    "UnsupportedModelError",
    "cartridge_chat_template",
    "check_base_model",
    "compose",
    "evaluate_cartridge",
    "gold_answer_nll",
    "initialize_cartridge",
    "list_cartridges",
    "load_cartridge",
    "load_self_study",
    "pull_cartridge",
    "push_cartridge",
    "quantize_cartridge",
    "shared_prefix",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
