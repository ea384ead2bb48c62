"""States in transformers' cache: the module is given a cache that holds the prefix's already.

transformers' modules go on from the states that they find in the cache. A prefix's are there for the first forward of a
sequence; what the module leaves is then put into the sequence's own cache, if it has one, and the steps behind it find it there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from .layers import RecurrentLayer, cached_states, state_kind

Aid = Callable[[Mapping[str, Tensor]], contextlib.AbstractContextManager[None]]


class StartingLayer(LinearAttentionLayer):
    """A cache's layer that begins with given states, and keeps what replaces them without writing into them, so that
    gradients reach them.

    Args:
        states: By name, `[batch, *shape]`.
        record_past: Whether all inputs of the convolution are kept, as the sequence's own cache does while it may be asked
            to take tokens back.
    """

    def __init__(self, states: Mapping[str, Tensor], record_past: bool = False) -> None:
        super().__init__(number_of_states=1 + max(state_kind(name)[1] for name in states))
        self.record_past = record_past
        held: Any = self
        for name, tensor in states.items():
            kind, index = state_kind(name)
            # A copy: the step for a single token writes into what it finds.
            getattr(held, f"{kind}_states")[index] = tensor.clone()
            getattr(held, f"is_{kind}_states_initialized")[index] = True
            held.has_previous_state[index] = True
            held.device, held.dtype = tensor.device, tensor.dtype
            if kind == "conv":
                held.conv_kernel_size[index] = tensor.shape[-1]

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        held: Any = self
        full = torch.cat([held.conv_states[state_idx].to(conv_states.dtype), conv_states], dim=-1)
        held.conv_states[state_idx] = full if self.record_past else full[..., -held.conv_kernel_size[state_idx] :]
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        held: Any = self
        held.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


def starting_cache(layer_idx: int, layer: StartingLayer) -> Cache:
    """A cache whose layer `layer_idx` is `layer`, and that is asked for no other."""
    return Cache(layers=[layer] * (layer_idx + 1))


@dataclass(frozen=True)
class CacheMemory:
    """Of a module that keeps its states in transformers' cache.

    Args:
        cache_parameter: The parameter that the cache is given by.
        aid: What has the module begin from states that it does not read from the cache itself, for as long as it runs;
            `None` where it reads all.
    """

    cache_parameter: str
    aid: Aid | None = None

    def own(self, layer: RecurrentLayer, arguments: Mapping[str, Any]) -> Any:
        cache = arguments.get(self.cache_parameter)
        if cache is None:
            return None
        own = cache.layers[layer.layer_idx] if layer.layer_idx < len(cache.layers) else None
        if not isinstance(own, LinearAttentionCacheLayerMixin):
            raise ValueError(
                f"The cache has no recurrent layer {layer.layer_idx} for `{layer.name}`: make it with the model's "
                "configuration, `DynamicCache(config=model.config)`."
            )
        return own

    def goes_on(self, layer: RecurrentLayer, arguments: Mapping[str, Any], is_first: bool) -> bool:
        cache = arguments.get(self.cache_parameter)
        if cache is None or layer.layer_idx >= len(cache.layers):
            return False
        return any(getattr(cache.layers[layer.layer_idx], "has_previous_state", {}).values())

    def states_to_go_on_from(self, own: Any, q_len: int) -> Mapping[str, Tensor] | None:
        return None if self.aid is None or q_len == 1 else cached_states(own)

    def run(
        self,
        layer: RecurrentLayer,
        forward: Callable[..., Any],
        arguments: dict[str, Any],
        begin: dict[str, Tensor],
        own: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        starting = StartingLayer(begin, record_past=own is not None and own.record_past)
        arguments = {**arguments, self.cache_parameter: starting_cache(layer.layer_idx, starting)}
        output = forward(**arguments) if self.aid is None else _run_aided(self.aid, begin, forward, arguments)
        return output, cached_states(starting)

    def keep(self, layer: RecurrentLayer, own: Any, states: Mapping[str, Tensor]) -> None:
        for name, tensor in states.items():
            kind, index = state_kind(name)
            own.has_previous_state[index] = False  # replaced, not gone on from
            if kind == "conv":
                own.update_conv_state(tensor, state_idx=index, conv_kernel_size=layer.states[name].shape[-1])
            else:
                own.update_recurrent_state(tensor, state_idx=index)
        for name in states:
            own.has_previous_state[state_kind(name)[1]] = True

    def output(self, output: Any, own: Any, states: Mapping[str, Tensor]) -> Any:
        return output


@torch.compiler.disable
def _run_aided(aid: Aid, begin: Mapping[str, Tensor], forward: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Outside of compiled graphs, which cannot read what an aid tells the module's code."""
    with aid(begin):
        return forward(**arguments)
