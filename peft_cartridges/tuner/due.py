"""What the adapters of a model make due to a forward: one composition for all rows, or an adapter for each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention.interface import LayerPrefix
from .buffers import JoinedTokens

BASE_ROW = "__base__"


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
        return (self.part(layer, module, query, None),)

    def part(self, layer: int, module: Any, query: Tensor, rows: Tensor | None) -> LayerPrefix:
        key, value = self.joined.get(layer, module, query.dtype, expand=self.expands[layer])
        config = self.joined.layers[layer].adapter_configs[self.joined.names[0]]
        return LayerPrefix(key.to(query.device), value.to(query.device), rows, config.attention, config.sliding_window)


class AdapterOfRows:
    """An adapter for each row of a batch, or none (`"__base__"`).

    Args:
        compositions: The adapters in use.
        names: The adapter of each row.
    """

    def __init__(self, compositions: dict[str, Composition], names: Sequence[str]) -> None:
        self.compositions = compositions
        self.num_tokens = torch.tensor([compositions[n].num_tokens if n in compositions else 0 for n in names])
        self._rows = {
            name: torch.tensor([row for row, of_row in enumerate(names) if of_row == name]) for name in compositions
        }

    def parts(self, layer: int, module: Any, query: Tensor) -> Sequence[LayerPrefix]:
        if self.num_tokens.device != query.device:
            self.num_tokens = self.num_tokens.to(query.device)
            self._rows = {name: rows.to(query.device) for name, rows in self._rows.items()}
        return [
            composition.part(layer, module, query, self._rows[name]) for name, composition in self.compositions.items()
        ]


def adapters_of_rows(names: Sequence[str], batch_size: int) -> list[str]:
    """Beams and returned sequences repeat every row some times, next to each other.

    Raises:
        ValueError: the names do not fit the batch.
    """
    repeats, rest = divmod(batch_size, len(names))
    if rest:
        raise ValueError(f"`adapter_names` has {len(names)} names, which does not fit a batch of {batch_size} rows.")
    return [name for name in names for _ in range(repeats)]
