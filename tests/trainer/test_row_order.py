"""General conversations in the order of training: their share of each batch, and all else as without them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from peft_cartridges.trainer.row_order import SeededOrder, by_chunk, by_length, spread

SIZE, BATCH = 203, 16
OFF = [*range(5, 12), *range(100, 113)]  # 20 of them
LENGTHS = [7 + 31 * number % 97 for number in range(SIZE)]
CHUNKS = [number % 9 for number in range(SIZE)]
ARRANGEMENTS = {"length": by_length(LENGTHS, BATCH), "chunk": by_chunk(CHUNKS, 4), "random": None}


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_each_batch_has_its_share(name: str, share: float) -> None:
    order = SeededOrder(SIZE, 3, ARRANGEMENTS[name], off_context=OFF, share=share)
    drawn = list(order)
    number = round(183 * share / (1 - share))
    assert len(order) == len(drawn) == 183 + number
    assert sorted(set(drawn) - set(OFF)) == sorted(set(range(SIZE)) - set(OFF))
    counts = [sum(index in OFF for index in drawn[first : first + BATCH]) for first in range(0, len(drawn), BATCH)]
    wanted = BATCH * number / len(drawn)
    assert sum(counts) == number and all(wanted - 1 < count < wanted + 1 for count in counts[:-1])


def test_all_of_them_are_used_alike_often() -> None:
    order = SeededOrder(SIZE, 3, ARRANGEMENTS["length"], off_context=OFF, share=0.04)  # 8 of the 20 a pass
    used: Counter[int] = Counter()
    for epoch in range(5):
        order.set_epoch(epoch)
        used.update(index for index in order if index in OFF)
    assert set(used) == set(OFF) and set(used.values()) == {2}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_without_a_share_the_order_is_that_of_the_rows_about_the_text(name: str) -> None:
    order = list(SeededOrder(SIZE, 3, ARRANGEMENTS[name], off_context=OFF, share=0.0))
    assert sorted(order) == sorted(set(range(SIZE)) - set(OFF))
    plain = SeededOrder(SIZE, 3, ARRANGEMENTS[name])
    assert list(SeededOrder(SIZE, 3, ARRANGEMENTS[name], share=0.5)) == list(plain)


def test_batches_are_of_like_length_with_them_too() -> None:
    drawn = list(SeededOrder(SIZE, 3, ARRANGEMENTS["length"], off_context=OFF, share=0.1))
    batches = [drawn[first : first + BATCH] for first in range(0, len(drawn) - BATCH + 1, BATCH)]
    spans = [
        max(lengths) - min(lengths)
        for batch in batches
        if (lengths := [LENGTHS[index] for index in batch if index not in OFF])
    ]
    assert max(spans) < 20 < max(LENGTHS) - min(LENGTHS)


def test_a_set_of_nothing_else_is_used_as_it_is() -> None:
    assert sorted(SeededOrder(4, 0, off_context=range(4), share=0.1)) == [0, 1, 2, 3]


def test_spread_keeps_both_orders() -> None:
    merged = spread([0, 1, 2, 3, 4, 5, 6], torch.Generator(), [10, 11])
    assert merged == [0, 1, 2, 3, 10, 4, 5, 6, 11]
    assert spread([3, 1], None, []) == [3, 1]
