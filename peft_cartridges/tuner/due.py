"""What the adapters of a model make due to a forward: one composition for all rows, or an adapter for each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention.interface import LayerPrefix
from .buffers import JoinedTokens

BASE_ROW = "__base__"
_FEW = 8


class Composition:
    """The prefixes of some adapters, one behind the other, for every row.

    Args:
        joined: Their keys and values.
        expands: For each layer, whether its module expands what it caches.
    """

    def __init__(self, joined: JoinedTokens, expands: Sequence[bool]) -> None:
        self.joined = joined
        self.expands = expands
        self.num_tokens = joined.num_tokens()

    def parts(self, layer: int, module: Any, query: Tensor) -> Sequence[LayerPrefix]:
        if not self.num_tokens:
            return ()
        key, value = self.tokens(layer, module, query)
        config = self.joined.layers[layer].adapter_configs[self.joined.names[0]]
        return (LayerPrefix(key, value, config.attention, config.sliding_window),)

    def tokens(self, layer: int, module: Any, query: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[num_key_value_heads, num_tokens, dim]`."""
        key, value = self.joined.get(layer, module, query.dtype, expand=self.expands[layer])
        return key.to(query.device), value.to(query.device)

    def state(self, layer: int, module: Any) -> Mapping[str, Tensor] | None:
        """What the `layer`-th recurrent layer begins from, in every row."""
        return self.joined.get_state(layer)


class AdapterOfRows:
    """An adapter for each row of a batch, or none (`"__base__"`): one computation for all rows.

    Args:
        compositions: The adapters in use.
        names: The adapter of each row.
    """

    def __init__(self, compositions: dict[str, Composition], names: Sequence[str]) -> None:
        self.compositions = list(compositions.values())
        self._names = list(names)
        self._place = {name: number for number, name in enumerate(compositions)}
        lengths = [composition.num_tokens for composition in self.compositions]
        index = [self._place.get(name, -1) for name in names]
        self.num_tokens = torch.tensor([lengths[number] if number >= 0 else 0 for number in index])
        self._index: Tensor | None = torch.tensor(index)
        self._lengths: Tensor | None = torch.tensor(lengths)
        # Attention picks among a few prefixes itself; of many, each row gets its own once, not at every step.
        self._gathers = len(lengths) > _FEW and index != list(range(len(lengths)))
        if self._gathers:
            self._lengths = self.num_tokens
        if self._gathers or index == list(range(len(lengths))):
            self._rows, self._index = self._index, None
        if len(set(self._lengths.tolist())) == 1:
            self._lengths = None
        self._kept: dict[tuple[int, torch.dtype, torch.device], Any] = {}

    def parts(self, layer: int, module: Any, query: Tensor) -> Sequence[LayerPrefix]:
        if not any(composition.num_tokens for composition in self.compositions):
            return ()
        where = (layer, query.dtype, query.device)
        parameters, version, *tokens = self._kept.get(where, ((), -1))
        if version != sum(parameter._version for parameter in parameters):
            tokens = [*self._stack(layer, module, query)]
            if not any(tensor.requires_grad or tensor.is_inference() for tensor in tokens):
                parameters = [
                    p for c in self.compositions for p in c.joined.layers[layer].parameters_of(c.joined.names[0])
                ]
                self._kept[where] = (parameters, sum(parameter._version for parameter in parameters), *tokens)
        if self.num_tokens.device != query.device:
            self.num_tokens = self.num_tokens.to(query.device)
            self._lengths, self._index = (t if t is None else t.to(query.device) for t in (self._lengths, self._index))
        config = self.compositions[0].joined.layers[layer].adapter_configs[self.compositions[0].joined.names[0]]
        key, value = tokens
        return (LayerPrefix(key, value, config.attention, config.sliding_window, self._lengths, self._index),)

    def state(self, layer: int, module: Any) -> Mapping[str, Tensor] | None:
        """What the `layer`-th recurrent layer begins from, `[batch, *shape]`; rows without an adapter from zeros, the state
        of no text."""
        states = [composition.state(layer, module) for composition in self.compositions]
        some = next((state for state in states if state is not None), None)
        if some is None:
            return None
        none = {name: torch.zeros_like(tensor) for name, tensor in some.items()}
        held = [none if state is None else state for state in (*states, None)]
        of_rows = [held[self._place.get(name, -1)] for name in self._names]
        return {name: torch.stack([state[name] for state in of_rows]) for name in some}

    def _stack(self, layer: int, module: Any, query: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = zip(*(c.tokens(layer, module, query) for c in self.compositions), strict=True)
        key, value = _stacked(keys), _stacked(values)
        if not self._gathers:
            return key, value
        rows = self._rows.clamp(min=0).to(query.device)
        return key[rows], value[rows]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """`[num_prefixes, heads, longest, dim]` of tensors `[heads, num_tokens, dim]`."""
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.stack([torch.nn.functional.pad(tensor, (0, 0, 0, longest - tensor.shape[1])) for tensor in tensors])


def adapters_of_rows(names: Sequence[str], batch_size: int) -> list[str]:
    """Beams and returned sequences repeat every row some times, next to each other.

    Raises:
        ValueError: the names do not fit the batch.
    """
    repeats, rest = divmod(batch_size, len(names))
    if rest:
        raise ValueError(f"`adapter_names` has {len(names)} names, which does not fit a batch of {batch_size} rows.")
    return [name for name in names for _ in range(repeats)]
