"""The bootstrap, and the statistics that it is taken of."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peft_cartridges.evaluation.intervals import Estimate, bootstrap, gap_share, weighted_mean


def test_means_and_shares_by_hand() -> None:
    every = np.arange(2)
    assert weighted_mean([4.0, 2.0])(every) == 3.0
    assert weighted_mean([4.0, 2.0], [1.0, 5.0])(every) == 1.0  # sums over tokens: 6 / 6
    # Without context 10 nats, with the text 4, ours 7: half of the gap.
    share = gap_share([6.0, 4.0], [4.0, 3.0], [2.0, 2.0])
    assert share(every) == 0.5
    assert share(np.array([0, 0])) == pytest.approx(0.5) and share(np.array([1])) == 0.5
    assert math.isnan(gap_share([1.0], [1.0], [1.0])(np.array([0])))


def test_the_interval_of_a_mean_is_the_normal_one_for_many_items() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    found = bootstrap(weighted_mean(values.tolist()), 400, samples=4000)
    error = values.std() / 20
    assert found.value == pytest.approx(values.mean()) and found.n == 400
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    narrower = bootstrap(weighted_mean(values.tolist()), 400, samples=4000, level=0.5)
    assert narrower.high - narrower.low < 0.5 * (found.high - found.low)


def test_whole_clusters_are_drawn() -> None:
    # Two documents whose questions agree within each: resampled questions hide what resampled documents show.
    values, clusters = [0.0] * 50 + [1.0] * 50, ["a"] * 50 + ["b"] * 50
    by_question = bootstrap(weighted_mean(values), 100)
    by_document = bootstrap(weighted_mean(values), 100, clusters=clusters)
    assert by_question.value == by_document.value == 0.5
    assert 0.35 < by_question.low < by_question.high < 0.65
    assert (by_document.low, by_document.high) == (0.0, 1.0)


def test_within_strata_the_same_number_is_drawn() -> None:
    # Two documents whose questions agree within each: with as many from each, the mean cannot move.
    values, strata = [0.0] * 3 + [1.0] * 9, ["a"] * 3 + ["b"] * 9
    found = bootstrap(weighted_mean(values), 12, strata=strata)
    assert (found.value, found.low, found.high) == (0.75, 0.75, 0.75)
    spread = bootstrap(weighted_mean([float(i) for i in range(12)]), 12, strata=strata)
    assert spread.low < spread.value == 5.5 < spread.high
    free = bootstrap(weighted_mean([float(i) for i in range(12)]), 12)
    assert spread.high - spread.low < free.high - free.low


def test_the_same_seed_gives_the_same_interval() -> None:
    statistic = weighted_mean([number**1.5 for number in range(11)])
    assert bootstrap(statistic, 11, seed=3) == bootstrap(statistic, 11, seed=3) != bootstrap(statistic, 11, seed=4)


def test_one_item_has_no_interval() -> None:
    found = bootstrap(weighted_mean([2.0]), 1)
    assert found.value == 2.0 and math.isnan(found.low) and f"{found:.1f}" == "2.0"
    assert f"{Estimate(2.0, 1.0, 3.0, 5):.1f}" == "2.0 [1.0, 3.0]"


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="no items"):
        bootstrap(weighted_mean([]), 0)
    with pytest.raises(ValueError, match="`clusters` has 1 entries for 2 items"):
        bootstrap(weighted_mean([1.0, 2.0]), 2, clusters=["a"])
    with pytest.raises(ValueError, match="`clusters` and `strata` do not go together"):
        bootstrap(weighted_mean([1.0, 2.0]), 2, clusters=["a", "b"], strata=["a", "b"])
