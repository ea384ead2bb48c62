"""Running a recurrent module from a state, as if it had read a text: it is given a cache that holds that state already.

transformers' modules go on from the states that they find in the cache. A prefix's are there for the first forward of a
sequence; what the module leaves is then put into the sequence's own cache, if it has one, and the steps behind it find it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from .layers import RecurrentLayer, cached_states, state_kind
from .rows import RowPlan, put, take


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


def run_from_state(
    layer: RecurrentLayer,
    forward: Callable[..., Any],
    arguments: dict[str, Any],
    state: Mapping[str, Tensor],
    plan: RowPlan | None,
) -> Any:
    """The module's output, begun from `state`; its cache, if there is one, holds what is left behind it.

    Args:
        layer: The module.
        forward: Its forward.
        arguments: Of the call, by name.
        state: By name, `[*shape]` for all rows or `[batch, *shape]`.
        plan: The texts in the rows, where a row is not one.

    Raises:
        ValueError: the state is not one of this module, or several texts of a row would share a cache.
    """
    hidden = arguments[layer.parameters[0]]
    batch_size, q_len = hidden.shape[:2]
    begin = _rows_of_state(layer, state, hidden)
    own = own_layer(layer, arguments)
    if plan is not None and plan.packed and own is not None:
        raise ValueError("Rows that several texts are packed into cannot share a cache: pass `use_cache=False`.")
    if plan is None or (plan.padded_behind and own is None):
        output, final = _run(layer, forward, arguments, begin, own)
    else:
        parts = []
        final = {name: tensor.clone() for name, tensor in begin.items()}
        for texts in plan.texts:
            rows = texts.rows.to(hidden.device)
            part, left = _run(
                layer,
                forward,
                take(arguments, texts, batch_size, q_len),
                {name: tensor[rows] for name, tensor in begin.items()},
                own,
            )
            parts.append(part)
            for name, tensor in left.items() if own is not None else ():
                final[name] = final[name].to(tensor.dtype).index_put((rows,), tensor)
        output = put(parts, plan, batch_size, q_len)
    if own is not None:
        _keep(layer, own, final)
    return output


def own_layer(layer: RecurrentLayer, arguments: Mapping[str, Any]) -> Any:
    """The layer of the sequence's own cache that the module is called with, or `None`."""
    cache = arguments.get(layer.cache_parameter)
    if cache is None:
        return None
    own = cache.layers[layer.layer_idx] if layer.layer_idx < len(cache.layers) else None
    if not isinstance(own, LinearAttentionCacheLayerMixin):
        raise ValueError(
            f"The cache has no recurrent layer {layer.layer_idx} for `{layer.name}`: make it with the model's "
            "configuration, `DynamicCache(config=model.config)`."
        )
    return own


def goes_on(layer: RecurrentLayer, arguments: Mapping[str, Any]) -> bool:
    """Whether the call goes on with a sequence whose state the cache holds."""
    cache = arguments.get(layer.cache_parameter)
    if cache is None or layer.layer_idx >= len(cache.layers):
        return False
    return any(getattr(cache.layers[layer.layer_idx], "has_previous_state", {}).values())


def go_on(
    layer: RecurrentLayer, forward: Callable[..., Any], arguments: dict[str, Any], plan: Callable[[], RowPlan | None]
) -> Any:
    """The module's output for tokens behind those of its cache. Several tokens at once begin from the cache's state also
    where the module by itself would begin them from zero."""
    hidden = arguments[layer.parameters[0]]
    if layer.aid is None or hidden.shape[1] == 1:
        return forward(**arguments)
    own = own_layer(layer, arguments)
    return run_from_state(layer, forward, arguments, cached_states(own), plan())


def _rows_of_state(layer: RecurrentLayer, state: Mapping[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
    """Each tensor as `[batch, *shape]`, where the hidden states are."""
    if set(state) != set(layer.states):
        raise ValueError(
            f"`{layer.name}` ({type(layer.module).__name__}) begins from {sorted(layer.states)}, and is given "
            f"{sorted(state)}: the prefix was made for another model."
        )
    rows = {}
    for name, want in layer.states.items():
        tensor = state[name]
        of_rows = tuple(tensor.shape) == (len(hidden), *want.shape)
        if not of_rows and tuple(tensor.shape) != want.shape:
            raise ValueError(
                f"`{layer.name}` ({type(layer.module).__name__}) has a state `{name}` of shape {want.shape}, and is given "
                f"{tuple(tensor.shape)} for {len(hidden)} rows: the prefix was made for another model."
            )
        tensor = tensor.to(hidden.device, hidden.dtype if name.startswith("conv") else tensor.dtype)
        rows[name] = tensor if of_rows else tensor.expand(len(hidden), *want.shape)
    return rows


def _run(
    layer: RecurrentLayer, forward: Callable[..., Any], arguments: dict[str, Any], begin: Mapping[str, Tensor], own: Any
) -> tuple[Any, dict[str, Tensor]]:
    starting = StartingLayer(begin, record_past=own is not None and own.record_past)
    with layer.beginning_from(begin):
        output = forward(**{**arguments, layer.cache_parameter: starting_cache(layer.layer_idx, starting)})
    return output, cached_states(starting)


def _keep(layer: RecurrentLayer, own: Any, states: Mapping[str, Tensor]) -> None:
    for name, tensor in states.items():
        kind, index = state_kind(name)
        own.has_previous_state[index] = False  # replaced, not gone on from
        if kind == "conv":
            size = layer.states[name].shape[-1]
            own.update_conv_state(tensor, state_idx=index, conv_kernel_size=size)
        else:
            own.update_recurrent_state(tensor, state_idx=index)
    for name in states:
        own.has_previous_state[state_kind(name)[1]] = True
