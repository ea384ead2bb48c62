"""What a training step costs: tokens and memory."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


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


def num_tokens(labels: Tensor) -> int:
    """Tokens of a batch without its padding: up to the last learned token of each row of `labels` `[batch, q_len]`."""
    positions = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return int(((labels != -100) * positions).amax(1).sum())
