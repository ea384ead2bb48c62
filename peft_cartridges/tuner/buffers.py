"""The cartridges of one or several adapters as attention takes them: frozen and trainable tokens joined, in the model's
dtype, and (in latent attention) expanded.

Doing that at every decoding step would cost more than the attention to them, so it is done once for a generation: a
forward that begins anew makes it anew, whatever has changed the parameters by then, and decoding steps behind it take it
again unless they see another parameter, or one that was written to. While a parameter may want a gradient, and in
compiled graphs, nothing is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention.interface import expand_tokens
from .layer import KeyValueLayer, StateLayer, join_tokens
from .states import join_states


class JoinedTokens:
    """Keys, values and states of a composition of adapters, for every layer.

    Args:
        layers: The attention layers with cartridges, by layer index.
        states: The recurrent layers with cartridges, by layer index.
        names: The adapters, in order.
    """

    def __init__(self, layers: Sequence[KeyValueLayer], states: Sequence[StateLayer], names: tuple[str, ...]) -> None:
        self.layers = layers
        self.states = states
        self.names = names
        self._kept: dict[int, tuple[Any, Tensor, Tensor]] = {}

    def begin(self) -> None:
        """What was kept is made anew."""
        self._kept.clear()

    def num_tokens(self) -> int:
        configs = (self.layers or self.states)[0].adapter_configs
        return sum(configs[name].num_tokens or 0 for name in self.names)

    def get_state(self, index: int) -> Mapping[str, Tensor] | None:
        """What a recurrent layer begins from, by the names of its parts; `None` where no adapter says.

        Args:
            index: The layer's place among `states`.
        """
        held = (self.states[index].get_state(name) for name in self.names) if self.states else ()
        given = [state for state in held if state is not None]
        return join_states(given) if given else None

    def get(self, index: int, module: Any, dtype: torch.dtype, *, expand: bool) -> tuple[Tensor, Tensor]:
        """Keys and values `[num_key_value_heads, num_tokens, dim]` of a layer.

        Args:
            index: The layer's place among `layers`.
            module: The attention module that asks.
            dtype: The dtype that the model computes in.
            expand: Whether the module expands what it caches before it attends to it.
        """
        layer = self.layers[index]
        parameters = [parameter for name in self.names for parameter in layer.parameters_of(name)]
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
        expands_with_gradient = expand and torch.is_grad_enabled()
        if torch.compiler.is_compiling() or trains or expands_with_gradient or _is_inference(parameters):
            return self._make(layer, module, dtype, expand)
        state = (dtype, torch.is_inference_mode_enabled(), [(id(p), p._version, p.data_ptr()) for p in parameters])
        kept = self._kept.get(index)  # another thread may clear what is kept
        if kept is None or kept[0] != state:
            kept = self._kept[index] = (state, *self._make(layer, module, dtype, expand))
        return kept[1:]

    def _make(self, layer: KeyValueLayer, module: Any, dtype: torch.dtype, expand: bool) -> tuple[Tensor, Tensor]:
        keys, values = zip(*(layer.get_tokens(name) for name in self.names), strict=True)
        key, value = join_tokens(*keys).to(dtype), join_tokens(*values).to(dtype)
        return expand_tokens(module, key, value) if expand else (key, value)


def _is_inference(parameters: Sequence[Tensor]) -> bool:
    """Tensors made in inference mode tell no version."""
    return any(parameter.is_inference() for parameter in parameters)
