"""Bootstrap confidence intervals: how far a figure would move with other questions, or other documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval.

    Args:
        value: The figure.
        low, high: Of the 95 % interval (or whichever level was asked for); NaN where there are too few items.
        n: Items that it is the mean of.
    """

    value: float
    low: float
    high: float
    n: int

    def __format__(self, spec: str) -> str:
        """The value and its interval, each as `spec` says."""
        if math.isnan(self.low):
            return format(self.value, spec)
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    n: int,
    *,
    clusters: Sequence[Hashable] | None = None,
    strata: Sequence[Hashable] | None = None,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """The percentile bootstrap (Efron 1979) of a statistic of `n` items.

    Args:
        statistic: Of an array of item indices; several systems that are measured on the same items are so resampled
            together.
        n: Items.
        clusters: Which items belong together (the questions of one document): whole clusters are drawn. Each item by
            itself by default.
        strata: Which items stand for the same thing that is not drawn itself (the questions of one document, where the
            interval is to be over questions alone): as many as there are are drawn from each. Not with `clusters`.
        samples, level, seed: Draws, the interval's level, and the seed of the draws.

    Raises:
        ValueError: there are no items, `clusters` or `strata` has another length, or both are given.
    """
    if n < 1:
        raise ValueError("there is nothing to measure: no items.")
    if clusters is not None and strata is not None:
        raise ValueError("`clusters` and `strata` do not go together.")
    for name, given in (("clusters", clusters), ("strata", strata)):
        if given is not None and len(given) != n:
            raise ValueError(f"`{name}` has {len(given)} entries for {n} items.")
    value = float(statistic(np.arange(n)))
    labels = list(range(n)) if clusters is None else list(clusters)
    members = _members(labels)
    if len(members) < 2 or samples < 2:
        return Estimate(value, math.nan, math.nan, n)
    rng = np.random.default_rng(seed)
    # Of each stratum, the numbers of its members; one stratum of all where there are none.
    groups = [np.arange(len(members))] if strata is None else _members(list(strata))
    drawn = [
        statistic(
            np.concatenate([members[group[i]] for group in groups for i in rng.integers(len(group), size=len(group))])
        )
        for _ in range(samples)
    ]
    low, high = (
        np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2]) if not np.isnan(drawn).all() else [math.nan] * 2
    )
    return Estimate(value, float(low), float(high), n)


def _members(labels: Sequence[Hashable]) -> list[np.ndarray]:
    """The indices of each label, in order of appearance."""
    found: dict[Hashable, list[int]] = {}
    for index, label in enumerate(labels):
        found.setdefault(label, []).append(index)
    return [np.array(indices) for indices in found.values()]


def weighted_mean(values: Sequence[float], weights: Sequence[float] | None = None) -> Callable[[np.ndarray], float]:
    """The statistic for `bootstrap`: sum of `values` over sum of `weights` (sums per item over tokens per item), or the
    plain mean."""
    numerator = np.asarray(values, dtype=float)
    denominator = np.ones_like(numerator) if weights is None else np.asarray(weights, dtype=float)
    return lambda items: float(numerator[items].sum() / denominator[items].sum())


def gap_share(
    without: Sequence[float], values: Sequence[float], full: Sequence[float]
) -> Callable[[np.ndarray], float]:
    """The statistic for `bootstrap`: the share of the gap between no context and the full text that is closed. All three
    are sums over the same tokens of the same items, so that their number cancels; NaN where there is no gap."""
    none, ours, all_of_it = (np.asarray(side, dtype=float) for side in (without, values, full))

    def share(items: np.ndarray) -> float:
        width = none[items].sum() - all_of_it[items].sum()
        return float((none[items].sum() - ours[items].sum()) / width) if width > 0 else math.nan

    return share
