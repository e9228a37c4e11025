"""Which row comes when: a pure function of the seed and the position, so that nothing needs to be remembered.

Each epoch of a source is its own permutation. Sources of given weights take turns as evenly as whole numbers allow.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b

_TURN = 2**32  # a position's share of a full turn, and the bounds of the weights, are counted in these
_GOLDEN = 2654435769  # the golden ratio of it: the multiples of no other number are spread as evenly
_HELD_OUT = -1  # the permutation that says which rows are kept for evaluation; epochs count from 0


class Order:
    """Rows of several sources in one endless order."""

    def __init__(
        self, sizes: Sequence[int | None], weights: Sequence[float | None], seed: int = 0, holdout: float = 0.0
    ) -> None:
        """sizes: rows of each source; None for a stream. weights: all are numbers, or all None, and then an epoch is
        every row of every source once. holdout: share of each source's rows that never comes, see `held_out`"""
        self.seed, self.sizes = seed, list(sizes)
        self._held = [_share(size, holdout) for size in sizes]
        self._kept = [None if size is None else size - held for size, held in zip(sizes, self._held)]
        self._starts = [0, *itertools.accumulate(kept or 0 for kept in self._kept)]
        self._bounds: list[int] = []
        if weights[0] is not None:
            summed = list(itertools.accumulate(float(weight or 0) for weight in weights))
            self._bounds = [0, *(round(_TURN * part / summed[-1]) for part in summed)]

    @property
    def rows_per_epoch(self) -> int | None:
        """As many rows as all sources have together; None where one is a stream."""
        return None if None in self._kept else self._starts[-1]

    def __call__(self, position: int) -> tuple[int, int, int]:
        """(source, epoch, row) at a position, counted from 0. In a stream the row counts on, and the epoch is 0."""
        if self._bounds:
            turn = (position * _GOLDEN + _digest(self.seed, "turn") % _TURN) % _TURN
            source = bisect_right(self._bounds, turn) - 1
            number = self._before(position, source)
            size = self._kept[source]
            if size is None:
                return source, 0, number
            epoch, index = divmod(number, size)
            index = shuffled(index, size, self.seed, source, epoch)
        else:
            total = self.rows_per_epoch
            if total is None:  # a stream, and nothing beside it
                return 0, 0, position
            epoch, index = divmod(position, total)
            index = shuffled(index, total, self.seed, epoch)
            source = bisect_right(self._starts, index) - 1
            index -= self._starts[source]
        return source, epoch, self._row(source, self._held[source] + index)

    def held_out(self) -> list[tuple[int, int]]:
        """(source, row) of every row that is kept for evaluation, in their own order."""
        return [(k, row) for k, held in enumerate(self._held) for row in sorted(self._row(k, i) for i in range(held))]

    def _row(self, source: int, index: int) -> int:
        """A row by its place in the permutation that has the held-out rows first."""
        size = self.sizes[source]
        assert size is not None
        return shuffled(index, size, self.seed, source, _HELD_OUT) if self._held[source] else index

    def _before(self, position: int, source: int) -> int:
        """How many of the positions before this one are the source's: those whose turn lies between its bounds."""
        start = _digest(self.seed, "turn") % _TURN
        low, high = self._bounds[source : source + 2]
        # x mod m < b is floor(x / m) - floor((x - b) / m), for every b from 0 to m.
        return _floor_sum(position, start - low) - _floor_sum(position, start - high)


def _share(size: int | None, holdout: float) -> int:
    """Rows to hold out of so many: at least one, where any are wanted and one is left to learn from."""
    return 0 if not size or not holdout else min(size - 1, max(1, round(size * holdout)))


def _floor_sum(count: int, start: int, step: int = _GOLDEN, modulus: int = _TURN) -> int:
    """Σ floor((start + i · step) / modulus) for i from 0 to count - 1, as Euclid's algorithm shortens it."""
    total = 0
    while count > 0:
        total += count * (count - 1) // 2 * (step // modulus) + count * (start // modulus)
        step, start = step % modulus, start % modulus
        top = start + count * step
        count, start, step, modulus = top // modulus, top % modulus, modulus, step
        if modulus == 0:
            break
    return total


def shuffled(index: int, size: int, *key: int) -> int:
    """Where a permutation of range(size) takes an index; each key has its own.

    Swap-or-not (Hoang, Morris and Rogaway, CRYPTO 2012): in each round an index and its partner change places, or do
    not. It needs no memory, whatever the size.
    """
    for number, turn in enumerate(_rounds(size, key)):
        partner = (turn - index) % size
        if _digest(*key, number, max(index, partner)) & 1:
            index = partner
    return index


@functools.lru_cache(maxsize=64)
def _rounds(size: int, key: tuple[int, ...]) -> tuple[int, ...]:
    """What an index and its partner add up to, in every round."""
    return tuple(_digest(*key, "round", number) % size for number in range(6 * size.bit_length() + 8))


def _digest(*key: int | str) -> int:
    """64 bits that differ with every key."""
    return int.from_bytes(blake2b(" ".join(map(str, key)).encode(), digest_size=8).digest())


def slot(size: int, *key: int) -> int:
    """One of range(size), drawn by a key."""
    return _digest("slot", *key) % size
