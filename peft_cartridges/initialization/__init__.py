"""Initial keys, values and states of a cartridge: one file per strategy, one table of them in `initialize.py`."""

from .initialize import InitializationStrategy, initialize_cartridge, list_strategies, register_strategy

__all__ = ["InitializationStrategy", "initialize_cartridge", "list_strategies", "register_strategy"]
