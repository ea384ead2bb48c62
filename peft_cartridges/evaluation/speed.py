"""How fast a system answers on this machine: time to first token, and tokens per second after it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..kv_prefix import evaluating
from .system import System


@dataclass(frozen=True)
class Speed:
    """Medians of a system whose keys and values are in memory already.

    Args:
        first_token_seconds: From a question to the first token of its answer, one row.
        tokens_per_second: Of all rows together, after the first token.
        batch_size: Rows.
    """

    first_token_seconds: float
    tokens_per_second: float
    batch_size: int


def wall_clock() -> float:
    """Seconds, after whatever the accelerator is still at."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def cpu_clock() -> float:
    """Seconds that this process has computed, over its threads: on a CPU that others use too, what the wall clock would
    say without them."""
    return time.process_time() / torch.get_num_threads()


@torch.no_grad()
def measure_speed(
    system: System,
    question: str,
    *,
    batch_size: int = 8,
    new_tokens: int = 16,
    repeats: int = 3,
    clock: Callable[[], float] = wall_clock,
) -> Speed:
    """Times greedy decoding of exactly `new_tokens` tokens. For retrieval, reading the passages is a part of the time to
    the first token."""
    first, whole = [], []
    ids = torch.tensor([system.preamble + system.codec.encode_prompt([question])])
    for _ in range(repeats + 1):
        start = clock()
        for _, context in system.parts([question]):
            with context as model, evaluating(model):
                _decode(model, ids, 1)
                first.append(clock() - start)
                rows = ids.expand(batch_size, -1)
                one = _seconds(model, rows, 1, clock)
                whole.append((_seconds(model, rows, new_tokens + 1, clock) - one) / new_tokens)
    # The first round warms up.
    per_token = statistics.median(whole[1:])
    return Speed(statistics.median(first[1:]), batch_size / per_token if per_token > 0 else float("inf"), batch_size)


def seconds_of(work: Callable[[], object], repeats: int = 3, clock: Callable[[], float] = wall_clock) -> float:
    """Median seconds, after once to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        start = clock()
        work()
        seconds.append(clock() - start)
    return statistics.median(seconds[1:])


def _seconds(model: Any, ids: torch.Tensor, new_tokens: int, clock: Callable[[], float]) -> float:
    start = clock()
    _decode(model, ids, new_tokens)
    return clock() - start


def _decode(model: Any, ids: torch.Tensor, new_tokens: int) -> None:
    device = next(model.parameters()).device
    ids = ids.to(device)
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=new_tokens, max_new_tokens=new_tokens,
        do_sample=False, temperature=None, top_p=None, top_k=None, pad_token_id=0,
    )  # fmt: skip
