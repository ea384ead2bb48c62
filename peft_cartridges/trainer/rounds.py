"""Conversations that are written while training goes on, so that each is used once, as in the paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from ..conversations import with_fast_targets
from ..conversations.rows import off_context_rows
from .row_order import spread


class ConversationRounds(TorchDataset[dict[str, Any]]):
    """A data set in rounds; a round is synthesized when the first of its rows is asked for, and forgets the one before.

    Args:
        synthesize: Gives the conversations of a round, given its number. Called by all processes at the same step, so
            that each may write its share.
        rows_per_round: How many rows a round lends; if `synthesize` gives fewer (empty answers are dropped), some are
            used twice.
        num_rounds: How many rounds there are.
        off_context: How many of a round's rows, its last, are general conversations.
    """

    def __init__(
        self, synthesize: Callable[[int], Dataset], rows_per_round: int, num_rounds: int, off_context: int = 0
    ) -> None:
        self.rows_per_round = rows_per_round
        self.num_rounds = num_rounds
        self.off_context = off_context
        self._synthesize = synthesize
        self._round = -1
        self._rows: Dataset | None = None

    def __len__(self) -> int:
        return self.rows_per_round * self.num_rounds

    @property
    def num_off_context(self) -> int:
        """How many of all rows are general conversations."""
        return self.off_context * self.num_rounds

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, row = divmod(index, self.rows_per_round)
        if number != self._round:
            # Synthesis draws from the global random state, which is the training's.
            with torch.random.fork_rng():
                made = self._synthesize(number)
                self._rows = with_fast_targets(made)
            self._round, apart = number, set(off_context_rows(made))
            self._kinds = [[place for place in range(len(made)) if place not in apart], sorted(apart)]
        assert self._rows is not None
        first = self.rows_per_round - self.off_context
        others, general = self._kinds
        kept = general if row >= first and general else others
        return self._rows[kept[(row - first if kept is general else row) % len(kept)]]


def size_of_rounds(args: Any) -> tuple[int, int, int]:
    """Of a run with `resample_every`: rows of a round, how many of them are general conversations, and rounds."""
    rows = args.resample_every * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return rows, min(round(rows * args.off_context_share), rows - 1), -(-args.max_steps // args.resample_every)


class RoundOrder(Sampler[int]):
    """Round after round, shuffled within each by its seed, general conversations evenly among the others."""

    def __init__(self, rounds: ConversationRounds, seed: int) -> None:
        self.rounds = rounds
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rounds)

    def __iter__(self) -> Iterator[int]:
        size = self.rounds.rows_per_round
        for number in range(self.rounds.num_rounds):
            generator = torch.Generator().manual_seed(self.seed + number)
            first = size - self.rounds.off_context
            order = (torch.randperm(first, generator=generator) + number * size).tolist()
            yield from spread(order, None, range(number * size + first, (number + 1) * size))
