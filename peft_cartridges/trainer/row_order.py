"""The order of training: random, a function of the seed and the epoch alone, with rows together that share work.

transformers groups rows of like length too, but its order comes from the global random state, which a resumed run and
other processes do not share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import Sampler


class SeededOrder(Sampler[int]):
    """Indices of one pass.

    Args:
        size: How many rows there are.
        seed: Of the order.
        arrange: Puts a shuffled order into batches, given a generator; `None` leaves it as it is.
    """

    def __init__(
        self, size: int, seed: int, arrange: Callable[[list[int], torch.Generator], list[int]] | None = None
    ) -> None:
        self.size = size
        self.seed = seed
        self.arrange = arrange
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        return iter(self.arrange(order, generator) if self.arrange else order)


def by_length(lengths: Sequence[int], batch_size: int) -> Callable[[list[int], torch.Generator], list[int]]:
    """Rows of like length in the same batch: groups of `50 * batch_size` shuffled rows are sorted by length, and the
    batches of all groups are shuffled. A short last batch comes last.

    Args:
        lengths: Of the rows.
        batch_size: Rows of one optimizer step, over all processes and accumulated batches, so that the steps are the
            same however they are divided.
    """

    def arrange(order: list[int], generator: torch.Generator) -> list[int]:
        whole = len(order) // batch_size * batch_size
        batches: list[list[int]] = []
        for start in range(0, whole, 50 * batch_size):
            group = sorted(order[start : min(start + 50 * batch_size, whole)], key=lambda index: -lengths[index])
            batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
        return [*_shuffled_together(batches, generator), *order[whole:]]

    return arrange


def by_chunk(chunks: Sequence[Any], rows_together: int) -> Callable[[list[int], torch.Generator], list[int]]:
    """Up to `rows_together` rows of the same chunk behind each other, so that a teacher reads it once for them.

    Args:
        chunks: What tells the rows' chunks apart.
        rows_together: How many rows of a chunk stand together.
    """

    def arrange(order: list[int], generator: torch.Generator) -> list[int]:
        runs: list[list[int]] = []
        open_runs: dict[Any, list[int]] = {}
        for index in order:
            run = open_runs.get(chunks[index])
            if run is None or len(run) == rows_together:
                run = open_runs[chunks[index]] = []
                runs.append(run)
            run.append(index)
        return _shuffled_together(runs, generator)

    return arrange


def row_lengths(dataset: Dataset) -> list[int]:
    """Tokens of each row, without reading the tokens into Python."""
    table = dataset.select_columns(["input_ids"]).with_format("arrow")[:]
    return pc.list_value_length(table["input_ids"]).to_pylist()


def _shuffled_together(parts: list[list[int]], generator: torch.Generator) -> list[int]:
    shuffled = torch.randperm(len(parts), generator=generator).tolist()
    return [index for part in shuffled for index in parts[part]]
