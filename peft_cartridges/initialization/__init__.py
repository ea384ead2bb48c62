"""Initial keys and values of a cartridge: one file per strategy, one registry."""

from .initialize import initialize_cartridge
from .registry import InitializationStrategy, get_strategy, list_strategies, register_strategy

__all__ = [
    "InitializationStrategy",
    "get_strategy",
    "initialize_cartridge",
    "list_strategies",
    "register_strategy",
]
