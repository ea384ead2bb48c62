"""The strategies that `initialize_cartridge` knows, by name."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from ..kv_prefix import KVPrefix
from .auto import auto
from .first_tokens import first_tokens
from .most_attended import most_attended


class InitializationStrategy(Protocol):
    """Makes a prefix of exactly `num_tokens` tokens from a text, with a model that has no active cartridge."""

    def __call__(
        self, model: nn.Module, processing_class: Any, text: str, *, num_tokens: int, chat_template: bool
    ) -> KVPrefix: ...


_STRATEGIES: dict[str, InitializationStrategy] = {
    "auto": auto,
    "first_tokens": first_tokens,
    "most_attended": most_attended,
}


def register_strategy(name: str, strategy: InitializationStrategy) -> None:
    """Adds a strategy of your own.

    Raises:
        ValueError: the name is taken.
    """
    if name in _STRATEGIES:
        raise ValueError(f"There is an initialization strategy `{name}` already.")
    _STRATEGIES[name] = strategy


def get_strategy(name: str) -> InitializationStrategy:
    """The strategy called `name`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in _STRATEGIES:
        raise ValueError(f"`strategy={name!r}` is unknown; there are: {', '.join(list_strategies())}.")
    return _STRATEGIES[name]


def list_strategies() -> list[str]:
    return sorted(_STRATEGIES)
