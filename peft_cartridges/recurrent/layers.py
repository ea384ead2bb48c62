"""What a recurrent layer is: a module that keeps states in transformers' cache, and what it keeps there of a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

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


class Memory(Protocol):
    """How modules of one kind keep their states from one forward to the next."""

    def own(self, layer: RecurrentLayer, arguments: Mapping[str, Any]) -> Any:
        """What the module is called with that keeps the sequence's states; `None` where nothing does."""

    def goes_on(self, layer: RecurrentLayer, arguments: Mapping[str, Any], is_first: bool) -> bool:
        """Whether a call goes on with a sequence; `is_first` says whether the model's call looked like a first."""

    def states_to_go_on_from(self, own: Any, q_len: int) -> Mapping[str, Tensor] | None:
        """The sequence's states, if the module has to be told them to go on; `None` where it reads them itself."""

    def run(
        self,
        layer: RecurrentLayer,
        forward: Callable[..., Any],
        arguments: dict[str, Any],
        begin: dict[str, Tensor],
        own: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        """The module's output from the states `begin`, and those that it leaves, `[batch, *shape]` each."""

    def keep(self, layer: RecurrentLayer, own: Any, states: Mapping[str, Tensor]) -> None:
        """Puts states into what keeps those of the sequence."""

    def output(self, output: Any, own: Any, states: Mapping[str, Tensor]) -> Any:
        """The module's output as its caller wants it."""


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
        memory: How it keeps them.
    """

    name: str
    module: Any
    layer_idx: int
    states: Mapping[str, StateShape]
    parameters: tuple[str, ...]
    memory: Memory

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
