"""The processes that accelerate started, which share the parts of a set."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch


def partial_state() -> Any:
    """accelerate's `PartialState`: which process this is, and its device. Without an accelerator it has to be told that
    processes on CPUs may be several, too."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


class Processes:
    """This process among those of the run; one alone where nothing was launched.

    Raises:
        ValueError: several processes were launched, but accelerate was set up in this one as if it were alone.
    """

    def __init__(self) -> None:
        self.index, self.count = 0, 1
        self._state = None
        launched = int(os.environ.get("WORLD_SIZE", "1"))  # set by `accelerate launch` and `torchrun`
        if launched > 1:
            self._state = partial_state()
            self.index, self.count = self._state.process_index, self._state.num_processes
            if self.count != launched:
                raise ValueError(
                    f"{launched} processes were launched, but accelerate's state knows of {self.count}: on CPUs make it "
                    "with `cpu=True`, or leave making it to the synthesizer."
                )

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def same(self, make: Callable[[], Any]) -> Any:
        """What the main process makes, in every process."""
        if self._state is None:
            return make()
        from accelerate.utils import broadcast_object_list

        (made,) = broadcast_object_list([make() if self.is_main else None])
        return made

    def wait_for_all(self) -> None:
        if self._state is not None:
            self._state.wait_for_everyone()
