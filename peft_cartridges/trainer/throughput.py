"""What a training step costs: tokens per second, and memory."""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor


class Throughput:
    """Counts the tokens between two looks, without waiting for the device."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._tokens: Tensor | None = None
        self._since = time.perf_counter()

    def add(self, labels: Tensor) -> None:
        """A batch without its padding: up to the last learned token of each row of `labels` `[batch, q_len]`."""
        positions = torch.arange(1, labels.shape[1] + 1, device=labels.device)
        tokens = ((labels != -100) * positions).amax(1).sum()
        self._tokens = tokens if self._tokens is None else self._tokens + tokens

    def take(self) -> float:
        """Tokens per second since the last look."""
        tokens = 0 if self._tokens is None else int(self._tokens)
        speed = tokens / (time.perf_counter() - self._since)
        self.restart()
        return speed


def memory_gib(device: torch.device) -> float:
    """Most memory used so far, in GiB: of the GPU where the training is on one, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
