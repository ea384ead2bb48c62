"""Initial keys, values and states of a cartridge: one file per strategy, one table of them in `initialize.py`."""

from .initialize import (
    InitializationStrategy,
    check_options,
    initialize_cartridge,
    list_strategies,
    needs_text,
    register_strategy,
)

__all__ = [
    "InitializationStrategy",
    "check_options",
    "initialize_cartridge",
    "list_strategies",
    "needs_text",
    "register_strategy",
]
