"""The order of training: random, a function of the seed and the epoch alone, with rows together that share work.

transformers groups rows of like length too, but its order comes from the global random state, which a resumed run and
other processes do not share.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import Sampler

from ..self_study.off_context import num_off_context

# Puts a shuffled order into batches, given a generator and the rows that are to be spread evenly over all of it.
Arrange = Callable[[list[int], torch.Generator, Sequence[int]], list[int]]


class SeededOrder(Sampler[int]):
    """Indices of one pass.

    Args:
        size: How many rows there are.
        seed: Of the order.
        arrange: Puts a shuffled order into batches; `None` leaves it as it is.
        shuffled: Whether the order is random; otherwise it is the data set's, with general conversations in between.
        off_context: Which rows are general conversations. They are a share of every stretch, whatever their number: some
            are left out of a pass, or used more than once in it.
        share: Which share. 0 leaves them all out.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        arrange: Arrange | None = None,
        *,
        shuffled: bool = True,
        off_context: Sequence[int] = (),
        share: float = 0.0,
    ) -> None:
        apart = set(off_context)
        self.seed = seed
        self.arrange = arrange or spread
        self.shuffled = shuffled
        self.epoch = 0
        self._off_context = list(off_context)
        self._others = [index for index in range(size) if index not in apart]
        if not self._others:  # there is nothing but general conversations
            self._others, self._off_context = self._off_context, []
        self._number = num_off_context(len(self._others), share) if self._off_context else 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._others) + self._number

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        order = self._others
        if self.shuffled:
            order = [order[place] for place in torch.randperm(len(order), generator=generator).tolist()]
        # Pass after pass goes on where the last one ended, so that all are used alike often.
        first, general = self.epoch * self._number, self._off_context
        drawn = [general[place % len(general)] for place in range(first, first + self._number)]
        return iter(self.arrange(order, generator, drawn))


def spread(order: list[int], generator: torch.Generator | None, others: Sequence[int]) -> list[int]:
    """Puts `others` into an order, evenly: every stretch has as many as its length says, up to one."""
    total = len(order) + len(others)
    rows, further = iter(order), iter(others)
    due = [(place + 1) * len(others) // total > place * len(others) // total for place in range(total)]
    return [next(further) if here else next(rows) for here in due]


def by_length(lengths: Sequence[int], batch_size: int) -> Arrange:
    """Rows of like length in the same batch: groups of 50 batches of shuffled rows are sorted by length, and the batches
    of all groups are shuffled. A short last batch comes last. General conversations are a share of each batch.

    Args:
        lengths: Of the rows.
        batch_size: Rows of one optimizer step, over all processes and accumulated batches, so that the steps are the
            same however they are divided.
    """

    def arrange(order: list[int], generator: torch.Generator, others: Sequence[int] = ()) -> list[int]:
        total = len(order) + len(others)
        whole = total // batch_size
        borders = [batch * batch_size * len(others) // total for batch in range(whole + 1)]
        shares = [list(others[a:b]) for a, b in itertools.pairwise(borders)]
        batches: list[list[int]] = []
        used = 0
        for start in range(0, whole, 50):
            sizes = [batch_size - len(share) for share in shares[start : start + 50]]
            group = iter(sorted(order[used : used + sum(sizes)], key=lambda index: -lengths[index]))
            batches += [list(itertools.islice(group, size)) for size in sizes]
            used += sum(sizes)
        mixed = [[*batch, *share] for batch, share in zip(batches, shares, strict=True)]
        return [*_shuffled_together(mixed, generator), *order[used:], *others[borders[-1] :]]

    return arrange


def by_chunk(chunks: Sequence[Any], rows_together: int) -> Arrange:
    """Up to `rows_together` rows of the same chunk behind each other, so that a teacher reads it once for them.

    Args:
        chunks: What tells the rows' chunks apart.
        rows_together: How many rows of a chunk stand together.
    """

    def arrange(order: list[int], generator: torch.Generator, others: Sequence[int] = ()) -> list[int]:
        runs: list[list[int]] = []
        open_runs: dict[Any, list[int]] = {}
        for index in order:
            run = open_runs.get(chunks[index])
            if run is None or len(run) == rows_together:
                run = open_runs[chunks[index]] = []
                runs.append(run)
            run.append(index)
        return spread(_shuffled_together(runs, generator), None, others)

    return arrange


def row_lengths(dataset: Dataset) -> list[int]:
    """Tokens of each row, without reading the tokens into Python."""
    table = dataset.select_columns(["input_ids"]).with_format("arrow")[:]
    return pc.list_value_length(table["input_ids"]).to_pylist()


def _shuffled_together(parts: list[list[int]], generator: torch.Generator) -> list[int]:
    shuffled = torch.randperm(len(parts), generator=generator).tolist()
    return [index for part in shuffled for index in parts[part]]
