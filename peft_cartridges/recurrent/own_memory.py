"""Recurrent models that keep their states past transformers' caches: a list of tensors (RWKV), a cache of their own (xLSTM).

Their blocks are given the states that they go on from, and give back those that they leave.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kv_prefix import evaluating
from .layers import RecurrentLayer, StateShape


class _Column:
    """One layer's tensor `[batch, hidden_size]` of a state that blocks index as `[:, :, layer]`, and write into."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor

    def __setitem__(self, index: Any, value: Tensor) -> None:
        self.tensor = value.to(self.tensor.dtype)


@dataclass(frozen=True)
class ListMemory:
    """A list of tensors `[batch, hidden_size, num_layers]` for all blocks: RWKV.

    Args:
        parameter: What model and blocks call it.
        names: Of its tensors, in order.
    """

    parameter: str
    names: tuple[str, ...]

    def of_output(self, output: Any, num_layers: int) -> list[dict[str, Tensor]]:
        """What a model's output holds, by layer; `[batch, *shape]` each."""
        held = output[self.parameter]
        return [
            {name: tensor[:, :, index] for name, tensor in zip(self.names, held, strict=True)}
            for index in range(num_layers)
        ]

    def own(self, layer: RecurrentLayer, arguments: Mapping[str, Any]) -> Any:
        return arguments.get(self.parameter)

    def goes_on(self, layer: RecurrentLayer, arguments: Mapping[str, Any], is_first: bool) -> bool:
        return not is_first

    def states_to_go_on_from(self, own: Any, q_len: int) -> Mapping[str, Tensor] | None:
        return None

    def run(
        self,
        layer: RecurrentLayer,
        forward: Callable[..., Any],
        arguments: dict[str, Any],
        begin: dict[str, Tensor],
        own: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        _refuse_without_gradient(layer, begin)
        columns = [_Column(begin[name]) for name in self.names]
        output = forward(**{**arguments, self.parameter: columns})
        output = tuple(None if part is columns else part for part in output)
        return output, {name: column.tensor for name, column in zip(self.names, columns, strict=True)}

    def keep(self, layer: RecurrentLayer, own: Any, states: Mapping[str, Tensor]) -> None:
        for tensor, name in zip(own, self.names, strict=True):
            tensor[:, :, layer.layer_idx] = states[name]

    def output(self, output: Any, own: Any, states: Mapping[str, Tensor]) -> Any:
        return (output[0], own, *output[2:])


@dataclass(frozen=True)
class BlockMemory:
    """Tensors that each block is given and gives back, and that the model keeps: xLSTM.

    Args:
        parameter: What the model calls its cache, which holds them in `rnn_state`, by layer.
        block_parameter: What a block calls its own.
        names: Of its tensors, in order.
    """

    parameter: str
    block_parameter: str
    names: tuple[str, ...]

    def of_output(self, output: Any, num_layers: int) -> list[dict[str, Tensor]]:
        held = output[self.parameter].rnn_state
        return [dict(zip(self.names, held[index], strict=True)) for index in range(num_layers)]

    def own(self, layer: RecurrentLayer, arguments: Mapping[str, Any]) -> Any:
        return arguments.get(self.block_parameter)

    def goes_on(self, layer: RecurrentLayer, arguments: Mapping[str, Any], is_first: bool) -> bool:
        return not is_first

    def states_to_go_on_from(self, own: Any, q_len: int) -> Mapping[str, Tensor] | None:
        return None

    def run(
        self,
        layer: RecurrentLayer,
        forward: Callable[..., Any],
        arguments: dict[str, Any],
        begin: dict[str, Tensor],
        own: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        hidden, left = forward(**{**arguments, self.block_parameter: tuple(begin[name] for name in self.names)})
        return (hidden, None), dict(zip(self.names, left, strict=True))

    def keep(self, layer: RecurrentLayer, own: Any, states: Mapping[str, Tensor]) -> None:
        """The model does, with what the block gives back."""

    def output(self, output: Any, own: Any, states: Mapping[str, Tensor]) -> Any:
        return (output[0], tuple(states[name] for name in self.names))


def _refuse_without_gradient(layer: RecurrentLayer, begin: Mapping[str, Tensor]) -> None:
    """transformers' `RwkvLinearAttention` gives back no gradient of the state: a trained one would learn nothing."""
    kernel = getattr(sys.modules[type(layer.module).__module__], "rwkv_cuda_kernel", None)
    if kernel is not None and any(tensor.requires_grad and tensor.is_cuda for tensor in begin.values()):
        raise ValueError(
            f"`{layer.name}` ({type(layer.module).__name__}) would run RWKV's CUDA kernel, which gives no gradient to the "
            "state that it begins from: set `transformers.models.rwkv.modeling_rwkv.rwkv_cuda_kernel = None` to train with "
            'PyTorch\'s operations, or keep the states as they are (`recurrent_state="initialize"`).'
        )


OwnMemory = ListMemory | BlockMemory

# By what a model's forward takes: a list for all blocks, or a cache of its own class (told by what its blocks take).
_LIST = ListMemory("state", ("shifted_feed_forward", "shifted_attention", "numerator", "denominator", "maximum"))
_BLOCKS = BlockMemory("cache_params", "state", ("memory", "normalizer", "stabilizer"))


def find_own_memory(model: nn.Module) -> tuple[OwnMemory, list[nn.Module]] | None:
    """The memory of a model whose blocks take a `state`, and its blocks; `None` of any other model."""
    parameters = inspect.signature(model.forward).parameters
    memory = next((one for one in (_LIST, _BLOCKS) if one.parameter in parameters), None)
    if memory is None:
        return None
    for module in model.modules():
        blocks = list(module) if isinstance(module, nn.ModuleList) else []
        if blocks and all("state" in inspect.signature(block.forward).parameters for block in blocks):
            return memory, blocks
    return None


def find_layers_with_own_memory(model: nn.Module, token: Tensor) -> list[RecurrentLayer]:
    """The blocks of a model with a memory of its own; one token `[1, 1]` goes through it. None of any other model."""
    found = find_own_memory(model)
    if found is None:
        return []
    memory, blocks = found
    with torch.no_grad(), evaluating(model):
        output = model(input_ids=token, use_cache=True)
    names = {module: name for name, module in model.named_modules()}
    return [
        RecurrentLayer(
            names[block],
            block,
            index,
            {name: StateShape(tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in states.items()},
            tuple(inspect.signature(block.forward).parameters),
            memory,
        )
        for index, (block, states) in enumerate(zip(blocks, memory.of_output(output, len(blocks)), strict=True))
    ]


def is_first(cache: Any) -> bool:
    """Whether a model that is called with `cache` (its own kind, or one of transformers', of which the layers tell) begins a
    sequence."""
    seen = getattr(cache, "seqlen_offset", None)
    return cache is None or (seen is not None and int(seen) == 0)
