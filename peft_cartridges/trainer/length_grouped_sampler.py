"""The order of training: random, with rows of like length in the same batch.

transformers has such a sampler too, but its order comes from the global random state, which a resumed run and other
processes do not share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class LengthGroupedSampler(Sampler[int]):
    """Indices of one pass, a function of `seed` and the epoch alone.

    Rows are shuffled, cut into groups of `50 * batch_size`, sorted by length within each, and the batches of all groups
    are shuffled. A short last batch comes last.

    Args:
        lengths: Of the rows.
        batch_size: Rows of one optimizer step, over all processes and accumulated batches, so that the steps are the
            same however they are divided.
        seed: Of the order.
        group: Whether rows of like length stand together; otherwise the order is merely random.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, *, group: bool = True) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.group = group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        if not self.group:
            return iter(order)
        size = self.batch_size
        whole = len(order) // size * size
        rest, batches = order[whole:], []
        for start in range(0, whole, 50 * size):
            group = sorted(order[start : min(start + 50 * size, whole)], key=lambda index: -self.lengths[index])
            batches += [group[i : i + size] for i in range(0, len(group), size)]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return iter([index for batch in shuffled for index in batches[batch]] + rest)
