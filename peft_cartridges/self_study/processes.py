"""Sharing a run's chunks among the processes that accelerate started."""

from __future__ import annotations

import os
from collections.abc import Sequence


class Processes:
    """This process among those of the run; one alone where nothing was launched."""

    def __init__(self) -> None:
        self.index, self.count = 0, 1
        self._state = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # set by `accelerate launch` and `torchrun`
            from accelerate import PartialState

            self._state = PartialState()
            self.index, self.count = self._state.process_index, self._state.num_processes

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def share(self, numbers: Sequence[int]) -> list[int]:
        """This process's part of some chunk numbers. It goes by the number alone, so that it stays the same when some
        are done already."""
        return [number for number in numbers if number % self.count == self.index]

    def wait_for_all(self) -> None:
        if self._state is not None:
            self._state.wait_for_everyone()
