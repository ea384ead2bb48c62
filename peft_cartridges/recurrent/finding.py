"""Which module of a model keeps a recurrent state in the cache, and whether it goes on from one that it finds there.

Told by the module itself: what it keeps shows when a token goes through it, and whether it reads a state when it is run once
more on some tokens with that state changed. So no architecture needs a name here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache

from ..kv_prefix import evaluating
from .cache_memory import CacheMemory
from .layers import RecurrentLayer, StateShape, cached_states
from .selective_scan import prepare_selective_scan, scanning_from

_TRIED_TOKENS = 3

# For modules that do not read a state by themselves: what prepares one (and says whether it is of that kind), and what has it
# begin from a state.
_AIDS = ((prepare_selective_scan, scanning_from),)


@dataclass
class RecordedCall:
    """A module that was called with the cache.

    Args:
        module: The module.
        arguments: Its arguments by name.
        parameters: The names of its forward's parameters.
        cache_parameter: The one that the cache was given by.
    """

    module: Any
    arguments: dict[str, Any]
    parameters: tuple[str, ...]
    cache_parameter: str


@dataclass
class RecordedCalls:
    """The innermost modules that put a state into the cache, by the cache's layer."""

    running: list[RecordedCall] = field(default_factory=list)
    of_layers: dict[int, list[RecordedCall]] = field(default_factory=dict)

    def keeps(self, layer_idx: int) -> None:
        """The module that runs now puts a state into a layer of the cache."""
        calls = self.of_layers.setdefault(layer_idx, [])
        if self.running and not any(call.module is self.running[-1].module for call in calls):
            calls.append(self.running[-1])

    @contextlib.contextmanager
    def of(self, model: nn.Module, cache: Cache) -> Iterator[None]:
        """Records the calls of a model's modules with `cache`."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            parameters = tuple(inspect.signature(module.forward).parameters)
            arguments = {**dict(zip(parameters, args, strict=False)), **kwargs}
            holding = next((name for name, value in arguments.items() if value is cache), None)
            if holding is not None:
                self.running.append(RecordedCall(module, arguments, parameters, holding))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if self.running and self.running[-1].module is module:
                self.running.pop()

        hooks = []
        try:
            for module in model.modules():
                hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
                hooks.append(module.register_forward_hook(after))
            yield
        finally:
            for hook in hooks:
                hook.remove()


def find_recurrent_layer(
    layer_idx: int, calls: list[RecordedCall], kept: Any, names: Mapping[Any, str]
) -> RecurrentLayer | str:
    """The module of a recurrent layer, or why it cannot begin from a state.

    Args:
        layer_idx: The layer's number in the cache.
        calls: The modules that put a state into it.
        kept: The cache's layer, after one token.
        names: Of the model's modules.
    """
    if len(calls) != 1 or calls[0].module not in names:
        inside = ", ".join(f"`{names[call.module]}`" for call in calls if call.module in names)
        return f"layer {layer_idx} keeps its state by several modules ({inside}), which cannot begin from it one by one"
    call = calls[0]
    states = {name: StateShape(tuple(t.shape[1:]), t.dtype) for name, t in cached_states(kept).items()}
    memory = CacheMemory(call.cache_parameter)
    layer = RecurrentLayer(names[call.module], call.module, layer_idx, states, call.parameters, memory)
    ignored = _ignored_states(layer, call)
    for prepare, aid in _AIDS if ignored else ():
        if prepare(layer.module):
            layer = dataclasses.replace(layer, memory=dataclasses.replace(memory, aid=aid))
            ignored = _ignored_states(layer, call)
            break
    if ignored:
        return (
            f"`{layer.name}` ({type(layer.module).__name__}) begins every text from zero: it reads no {ignored[0]} state "
            "from the cache for more than one token"
        )
    return layer


@torch.enable_grad()
def _ignored_states(layer: RecurrentLayer, call: RecordedCall) -> list[str]:
    """The states that make no difference to what the module gives for some tokens. On `meta` nothing can be told. With
    gradients, as bitsandbytes packs 4-bit weights when it sees inference on a CPU, and does not train them after."""
    hidden = call.arguments[layer.parameters[0]]
    if hidden.is_meta:
        return []

    def longer(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[:2] == (1, 1):
            return value.repeat_interleave(_TRIED_TOKENS, dim=1)
        return value

    arguments = {name: tree_map(longer, value) for name, value in call.arguments.items()}
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to(hidden.device, dtype)

    arguments[layer.parameters[0]] = draw((_TRIED_TOKENS, hidden.shape[2]), hidden.dtype).requires_grad_()
    begin = {name: draw(state.shape, state.dtype) for name, state in layer.states.items()}

    def output(states: Mapping[str, Tensor]) -> list[Tensor]:
        given, _ = layer.memory.run(layer, layer.module.forward, arguments, dict(states), None)
        parts = given if isinstance(given, tuple) else (given,)
        return [part for part in parts if isinstance(part, Tensor)]

    ignored = []
    with evaluating(layer.module):
        first = output(begin)
        for name, tensor in begin.items():
            # By so much that what is forgotten within a token still shows in half precision.
            much = torch.finfo(tensor.dtype).max ** 0.8
            changed = output({**begin, name: (tensor + 1) * much})
            if all(torch.equal(one, other) for one, other in zip(first, changed, strict=True)):
                ignored.append(name)
    return ignored
