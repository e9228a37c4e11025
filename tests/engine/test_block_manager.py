"""Who holds what, against a plain model of it; steps are drawn by hypothesis."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from llama_multimodal.engine.block_manager import BlockManager, ImageEntry, ImagePool, digest

KEYS = [digest(i) for i in range(6)]


class Blocks(RuleBasedStateMachine):
    """Rows hold lists of blocks; the model knows who holds what, what each name stands for, and what was freed when."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(7, 4)
        self.rows: list[list[int]] = []
        self.names: dict[bytes, int] = {}
        self.freed: list[int] = []  # named ones that nobody holds, the longest unused first

    def held(self) -> Counter[int]:
        return Counter(block for row in self.rows for block in row)

    @rule(count=st.integers(0, 8))
    def allocate(self, count: int) -> None:
        free = 7 - len(self.held())
        blocks = self.manager.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks is None:
            return
        assert len(set(blocks)) == count and not set(blocks) & self.held().keys()
        taken = [block for block in self.freed if block in blocks]
        assert taken == self.freed[: len(taken)]  # the longest unused are overwritten, and only where no other is left
        assert not taken or 7 - len(self.held()) - len(self.freed) <= count - len(taken)
        self.freed = self.freed[len(taken) :]
        self.names = {key: block for key, block in self.names.items() if block not in taken}
        self.rows.append(blocks)

    @rule(row=st.integers(0, 20), place=st.integers(0, 20), key=st.sampled_from(KEYS))
    def name(self, row: int, place: int, key: bytes) -> None:
        if not self.rows or not self.rows[row % len(self.rows)]:
            return
        blocks = self.rows[row % len(self.rows)]
        block = blocks[place % len(blocks)]
        self.manager.name(block, key)
        if key not in self.names and block not in self.names.values():
            self.names[key] = block

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=4, unique=True))
    def take_named(self, keys: list[bytes]) -> None:
        expected = []
        for key in keys:
            if key not in self.names:
                break
            expected.append(self.names[key])
        assert self.manager.take_named(keys) == expected
        self.freed = [block for block in self.freed if block not in expected]
        self.rows.append(expected)

    @rule(row=st.integers(0, 20))
    def release(self, row: int) -> None:
        if self.rows:
            blocks = self.rows.pop(row % len(self.rows))
            self.manager.release(blocks)
            left = self.held()
            self.freed += [b for b in reversed(blocks) if b not in left and b in self.names.values()]

    @invariant()
    def accounts_agree(self) -> None:
        assert self.manager.num_held == len(self.held())
        assert self.manager.num_held + self.manager.num_free == 7
        assert self.manager._by_key == self.names


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, database=None)


class Images(RuleBasedStateMachine):
    """Images by name, some of them encoded; those that nobody holds any more are kept while there is room."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = ImagePool(9)
        self.holds: list[ImageEntry] = []
        self.kept: list[bytes] = []

    @rule(number=st.integers(0, 5))
    def acquire(self, number: int) -> None:
        key, size = KEYS[number], 1 + number
        held = {entry.key: entry for entry in self.holds if entry.error is None}
        used = sum({id(entry): len(entry.units) for entry in self.holds}.values())
        entry = self.pool.acquire(key, size)
        if key in held:
            assert entry is held[key]
        elif key in self.kept:
            assert entry is not None and entry.ready
            self.kept.remove(key)
        else:
            assert (entry is None) == (size > 9 - used)
        if entry is not None:
            self.holds.append(entry)
            self.kept = [other for other in self.kept if other in self.pool._kept]

    @rule(which=st.integers(0, 20))
    def encoded(self, which: int) -> None:
        if self.holds and self.holds[which % len(self.holds)].error is None:
            self.holds[which % len(self.holds)].ready = True

    @rule(which=st.integers(0, 20))
    def failed(self, which: int) -> None:
        if self.holds and not (entry := self.holds[which % len(self.holds)]).ready and entry.error is None:
            self.pool.fail(entry, ValueError("no picture"))

    @rule(which=st.integers(0, 20))
    def release(self, which: int) -> None:
        if self.holds:
            entry = self.holds.pop(which % len(self.holds))
            self.pool.release(entry)
            if entry.ready and entry not in self.holds:
                self.kept.append(entry.key)

    @invariant()
    def every_unit_is_somewhere_once(self) -> None:
        holders = Counter(map(id, self.holds))
        entries = {id(entry): entry for entry in self.holds}
        assert all(entries[i].references == count for i, count in holders.items())
        assert list(self.pool._kept) == self.kept  # in the order in which they were let go of
        units = [u for entry in (*entries.values(), *self.pool._kept.values()) for u in entry.units]
        assert sorted([*units, *self.pool._free]) == list(range(9))
        assert self.pool.num_held == sum(len(entry.units) for entry in entries.values())


TestImages = Images.TestCase
TestImages.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, database=None)


def test_nothing_is_freed_twice() -> None:
    blocks = BlockManager(2, 4)
    held = blocks.allocate(1)
    assert held is not None
    blocks.release(held)
    with pytest.raises(RuntimeError, match="nobody holds it"):
        blocks.release(held)
    images = ImagePool(2)
    entry = images.acquire(KEYS[0], 1)
    assert entry is not None
    images.release(entry)
    with pytest.raises(RuntimeError, match="nobody holds it"):
        images.release(entry)


def test_a_prefix_is_forgotten_from_its_end() -> None:
    blocks = BlockManager(4, 1)
    row = blocks.allocate(3)
    assert row is not None
    for block, key in zip(row, KEYS):
        blocks.name(block, key)
    blocks.release(row)
    blocks.allocate(2)  # the empty one, and the row's last
    assert blocks.take_named(KEYS[:3]) == row[:2]
