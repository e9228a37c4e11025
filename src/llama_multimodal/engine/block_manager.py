"""Who holds which part of the cache: blocks of the text's keys and values, and units of the images' (no tensors here).

What nobody holds any more stays where it is, under its name, until its place is needed: the least recently used goes
first. So a prefix or a picture that comes again is found again.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Key = bytes
"""The name of what a block or an image holds: equal names, equal contents."""


def digest(*parts: object) -> Key:
    """A name that depends on each part and their order."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def content_digest(data: Any) -> bytes:
    """Of a buffer's bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


class BlockManager:
    """Blocks of `block_size` tokens with reference counts; full ones have a name and may be shared."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.clear()

    def clear(self) -> None:
        """Forget everything: nobody holds anything."""
        self._references = [0] * self.num_blocks
        self._keys: list[Key | None] = [None] * self.num_blocks
        self._by_key: dict[Key, int] = {}
        self._empty = list(range(self.num_blocks - 1, -1, -1))  # held by nobody, nothing in them that has a name
        self._kept: OrderedDict[int, None] = OrderedDict()  # held by nobody, least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._empty) + len(self._kept)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def take_named(self, keys: Iterable[Key]) -> list[int]:
        """Hold the blocks of these names, in their order, as far as they are there."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            self._kept.pop(block, None)
            self._references[block] += 1
            found.append(block)
        return found

    def allocate(self, count: int) -> list[int] | None:
        """Hold `count` blocks without a name; None, and nothing held, where too few are free."""
        if count > self.num_free:
            return None
        blocks = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def name(self, block: int, key: Key) -> None:
        """Say what a full block holds, so that others find it; the first block of a name keeps it."""
        if self._keys[block] is None and key not in self._by_key:
            self._keys[block] = key
            self._by_key[key] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a row's blocks. Its end is forgotten before its beginning, which more rows share."""
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise RuntimeError(f"block {block} is let go of, and nobody holds it")
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._keys[block] is None:
                    self._empty.append(block)
                else:
                    self._kept[block] = None

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        key = self._keys[block]
        assert key is not None
        del self._by_key[key]
        self._keys[block] = None
        return block


@dataclass(eq=False)
class ImageEntry:
    """An image's place in the pool. units: its parts there, in their order; started, ready: how far its encoding is."""

    key: Key
    units: list[int]
    references: int = 1
    started: bool = False
    ready: bool = False
    error: Exception | None = field(default=None, repr=False)


class ImagePool:
    """Encoded images by name, in units of one tile (keys and values) or one token (embeddings)."""

    def __init__(self, num_units: int) -> None:
        self.num_units = num_units
        self.hits = self.misses = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything: nobody holds anything."""
        self._free = list(range(self.num_units - 1, -1, -1))
        self._held: dict[Key, ImageEntry] = {}
        self._kept: OrderedDict[Key, ImageEntry] = OrderedDict()  # ready, held by nobody, least recently used first

    @property
    def num_held(self) -> int:
        return self.num_units - self._num_free

    @property
    def _num_free(self) -> int:
        """Units that nobody holds."""
        return len(self._free) + sum(len(kept.units) for kept in self._kept.values())

    def acquire(self, key: Key, size: int) -> ImageEntry | None:
        """Hold an image; the caller encodes it where it is not `ready` and nobody has begun to. None without room."""
        entry = self._held.get(key)
        if entry is not None:
            entry.references += 1
        elif (entry := self._kept.pop(key, None)) is not None:
            entry.references = 1
            self._held[key] = entry
        else:
            if self._num_free < size:
                return None
            while len(self._free) < size:
                _, evicted = self._kept.popitem(last=False)
                self._free += evicted.units
            self.misses += 1
            entry = self._held[key] = ImageEntry(key, [self._free.pop() for _ in range(size)])
            return entry
        self.hits += 1
        return entry

    def release(self, entry: ImageEntry) -> None:
        """Let go of an image. One that was never encoded is forgotten."""
        if entry.references < 1:
            raise RuntimeError("an image is let go of, and nobody holds it")
        entry.references -= 1
        if entry.references == 0:
            if self._held.get(entry.key) is entry:
                del self._held[entry.key]
            if entry.ready:
                self._kept[entry.key] = entry
            else:
                self._free += entry.units

    def fail(self, entry: ImageEntry, error: Exception) -> None:
        """An image cannot be encoded: its holders see why, and nobody finds it again."""
        entry.error = error
        if self._held.get(entry.key) is entry:
            del self._held[entry.key]
