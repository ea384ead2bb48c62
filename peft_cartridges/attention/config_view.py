"""A configuration that is the model's own, but for the attention function that it names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ConfigView:
    """A configuration as an attention module sees it: the model's own, read and written through, but for the name of
    the attention function, which `implementation` gives."""

    def __init__(self, config: Any, implementation: Callable[[], str | None]) -> None:
        object.__setattr__(self, "_kv_prefix_view", (config, implementation))

    @property
    def _attn_implementation(self) -> str | None:
        config, implementation = self._kv_prefix_view
        return implementation() or config._attn_implementation

    def __getattr__(self, name: str) -> Any:
        if name == "_kv_prefix_view":  # while a copy is being made
            raise AttributeError(name)
        return getattr(self._kv_prefix_view[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._kv_prefix_view[0], name, value)


def model_config(config: Any) -> Any:
    """The model's own configuration behind a `ConfigView`, or `config` itself."""
    return config._kv_prefix_view[0] if isinstance(config, ConfigView) else config
