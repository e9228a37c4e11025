"""The order of rows: permutations, shares, resuming at any place, rows held out."""

from __future__ import annotations

from collections import Counter

import pytest

from llama_multimodal.train.chat.order import Order, shuffled


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 1000])
def test_a_permutation_for_every_key(size: int) -> None:
    orders = {tuple(shuffled(i, size, 7, key) for i in range(size)) for key in range(5)}
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size >= 64:
        assert len(orders) == 5
        for order in orders:  # no index stays near where it was more often than chance has it
            assert sum(abs(i - place) < size / 20 for i, place in enumerate(order)) < size / 5


def test_small_permutations_are_all_drawn_alike() -> None:
    counts = Counter(tuple(shuffled(i, 3, key) for i in range(3)) for key in range(3000))
    assert len(counts) == 6 and min(counts.values()) > 400


def test_without_weights_each_row_comes_once_an_epoch() -> None:
    order = Order([5, 11, 2], [None] * 3, seed=3)
    assert order.rows_per_epoch == 18
    epochs = [[order(p)[::2] for p in range(18 * e, 18 * e + 18)] for e in range(3)]
    every = sorted((k, row) for k, size in enumerate((5, 11, 2)) for row in range(size))
    assert all(sorted(epoch) == every for epoch in epochs) and epochs[0] != epochs[1]


def test_weights_are_met_at_every_length() -> None:
    weights = [5.0, 3.0, 1.0, 0.01]
    order = Order([40, 7, 100, 3], weights, seed=1)
    counts: Counter[int] = Counter()
    rows: dict[int, list[int]] = {k: [] for k in range(4)}
    for position in range(4000):
        source, epoch, row = order(position)
        assert epoch == counts[source] // order.sizes[source]
        counts[source] += 1
        rows[source].append(row)
        for k, weight in enumerate(weights):
            assert abs(counts[k] - (position + 1) * weight / sum(weights)) < 3
    for k, size in enumerate((40, 7, 100)):  # and each source goes through all of its rows before any comes again
        for begin in range(0, len(rows[k]) - size, size):
            assert sorted(rows[k][begin : begin + size]) == list(range(size))
    assert rows[1][:7] != rows[1][7:14]


def test_far_positions_need_no_counting() -> None:
    order = Order([1000, 10], [3, 1], seed=1)
    far = 10**15
    sources = [order(far + i)[0] for i in range(1000)]
    assert abs(sources.count(1) - 250) < 3


def test_the_seed_changes_the_order() -> None:
    assert [Order([50], [None], seed=1)(p) for p in range(50)] != [Order([50], [None], seed=2)(p) for p in range(50)]


@pytest.mark.parametrize("weights", [[None, None], [2.0, 1.0]])
def test_rows_held_out_never_come(weights: list[float | None]) -> None:
    order = Order([50, 20], weights, seed=5, holdout=0.1)
    held = order.held_out()
    assert Counter(k for k, _ in held) == {0: 5, 1: 2} and held == sorted(held)
    assert order.rows_per_epoch == 63
    drawn = {order(p)[::2] for p in range(400)}
    assert not drawn & set(held)
    assert drawn | set(held) == {(k, row) for k, size in enumerate((50, 20)) for row in range(size)}
    assert held != Order([50, 20], weights, seed=6, holdout=0.1).held_out()


def test_something_is_always_left_to_learn_from() -> None:
    assert Order([1], [None], holdout=0.5).held_out() == []
    assert len(Order([3], [None], holdout=0.01).held_out()) == 1
