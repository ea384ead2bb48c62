"""The baselines by name: a row each. A method of your own is one function of a `Bench`; see `register_baseline`."""

from __future__ import annotations

import functools
from collections.abc import Callable

from ...initialization import list_strategies
from ..system import System
from . import lora, presses, quantized, retrieval, texts, untrained
from .bench import Bench

Baseline = Callable[[Bench], System]

# Strategies that are baselines already, or need another cartridge.
_NOT = ("auto", "first_tokens", "summary", "pretrained")

BASELINES: dict[str, Baseline] = {
    "no_context": texts.no_context,
    "full_text": texts.full_text,
    "first_tokens": texts.first_tokens,
    "summary": texts.summary,
    "bm25": retrieval.bm25,
    "dense": retrieval.dense,
    "lora": lora.lora,
    "quantized_4bit": functools.partial(quantized.quantized_cache, 4),
    "quantized_2bit": functools.partial(quantized.quantized_cache, 2),
    **{
        f"untrained_{name}": functools.partial(untrained.by_strategy, name)
        for name in list_strategies()
        if name not in _NOT
    },
    "untrained_unrelated_text": untrained.unrelated_text,
    **{f"kvpress_{name}": functools.partial(presses.pressed, name) for name in presses.PRESSES},
}


def register_baseline(name: str, baseline: Baseline) -> None:
    """Adds a method of your own: a function that makes a `System` of a `Bench`, or raises `NotApplicable` with the
    reason.

    Raises:
        ValueError: the name is taken.
    """
    if name in BASELINES:
        raise ValueError(f"There is a baseline `{name}` already.")
    BASELINES[name] = baseline


def get_baseline(name: str) -> Baseline:
    """Raises:
    ValueError: there is none of that name; the message lists those there are.
    """
    if name not in BASELINES:
        raise ValueError(f"The baseline {name!r} is unknown; there are: {', '.join(list_baselines())}.")
    return BASELINES[name]


def list_baselines() -> list[str]:
    return list(BASELINES)
