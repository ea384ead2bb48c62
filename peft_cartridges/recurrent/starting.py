"""Running a recurrent module from a state, as if it had read a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .layers import RecurrentLayer
from .rows import RowPlan, put, take


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
    own = layer.memory.own(layer, arguments)
    if plan is not None and plan.packed and own is not None:
        raise ValueError("Rows that several texts are packed into cannot share a cache: pass `use_cache=False`.")
    if plan is None or (plan.padded_behind and own is None):
        output, final = layer.memory.run(layer, forward, arguments, begin, own)
    else:
        parts = []
        final = {name: tensor.clone() for name, tensor in begin.items()}
        for texts in plan.texts:
            rows = texts.rows.to(hidden.device)
            part, left = layer.memory.run(
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
        layer.memory.keep(layer, own, final)
    return layer.memory.output(output, own, final)


def goes_on(layer: RecurrentLayer, arguments: Mapping[str, Any], is_first: bool) -> bool:
    """Whether the call goes on with a sequence whose state the module has; `is_first` says what the model's arguments say."""
    return layer.memory.goes_on(layer, arguments, is_first)


def go_on(
    layer: RecurrentLayer, forward: Callable[..., Any], arguments: dict[str, Any], plan: Callable[[], RowPlan | None]
) -> Any:
    """The module's output for tokens behind those of its cache. Several tokens at once begin from the cache's state also
    where the module by itself would begin them from zero."""
    own = layer.memory.own(layer, arguments)
    states = layer.memory.states_to_go_on_from(own, arguments[layer.parameters[0]].shape[1])
    if states is None:
        return forward(**arguments)
    return run_from_state(layer, forward, arguments, states, plan())


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
