"""What a recurrent layer is: a module that keeps states in transformers' cache, and what it keeps there of a text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin


@dataclass(frozen=True)
class StateShape:
    """One tensor of a recurrent layer's state, without a batch dimension.

    Args:
        shape: Its size; of a convolution's last inputs `(channels, kernel_size)`.
        dtype: As the model keeps it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class RecurrentLayer:
    """A module that can begin from the state of a prefix.

    Args:
        name: Its qualified name in the transformers model.
        module: The module itself.
        layer_idx: Its number among the model's layers, as caches know it.
        states: What it keeps, by name (`conv`, `recurrent`; `conv_1`, … where there are several).
        parameters: The names of its forward's parameters, the first of which are the hidden states
            `[batch, q_len, hidden_size]`.
        cache_parameter: The one that the cache is given by.
        aid: What has the module begin from states that it does not read from the cache itself, for as long as it runs;
            `None` where it reads all.
    """

    name: str
    module: Any
    layer_idx: int
    states: Mapping[str, StateShape]
    parameters: tuple[str, ...]
    cache_parameter: str
    aid: Callable[[Mapping[str, Tensor]], contextlib.AbstractContextManager[None]] | None = None

    def beginning_from(self, states: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[None]:
        """In which the module runs from `states`, `[batch, *shape]` each, that its cache holds."""
        return contextlib.nullcontext() if self.aid is None else self.aid(states)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}


def state_name(kind: str, number: int) -> str:
    """`conv` or `recurrent`, numbered from the second on."""
    return f"{kind}_{number}" if number else kind


def state_kind(name: str) -> tuple[str, int]:
    """The two parts of a name."""
    kind, _, number = name.partition("_")
    return kind, int(number or 0)


def cached_states(layer: LinearAttentionCacheLayerMixin) -> dict[str, Tensor]:
    """What a cache's layer holds, by name: tensors `[batch, *shape]`."""
    states: dict[str, Tensor] = {}
    held: Any = layer
    for number in held.conv_states:
        if held.is_conv_states_initialized[number]:
            states[state_name("conv", number)] = held.conv_states[number]
        if held.is_recurrent_states_initialized[number]:
            states[state_name("recurrent", number)] = held.recurrent_states[number]
    return states
