"""The header of a GGUF file: its metadata, and where each tensor lies.

Every length is held against what is left of the file before anything is read or allocated, so a damaged count costs
nothing. Source: the format's description, `docs/gguf.md` of ggml.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import CheckpointError

Buffer = bytes | memoryview

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)  # 1 counted in 32 bits, and no file has it any more
_ALIGNMENT = 32  # where the file does not say
_MAX_AXES = 4
_SMALLEST_ENTRY, _SMALLEST_TENSOR = 13, 24  # bytes of the shortest that the format allows


@dataclass(frozen=True)
class StoredTensor:
    """What the table says of a tensor."""

    shape: tuple[int, ...]  # in torch's order: the last axis is contiguous
    kind: int  # ggml's number of its type
    offset: int  # of its first byte in the file


@dataclass(frozen=True)
class GGUFHeader:
    """metadata: by key, strings as `str`, arrays as lists. tensors: by name, in the table's order."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def read_header(path: Path, data: Buffer) -> GGUFHeader:
    """Read the header of a file whose bytes are `data`.

    Raises:
        CheckpointError: not a GGUF file, of an unknown version, or damaged or truncated within its header.
    """
    cursor = _Cursor(path, data)
    if bytes(data[:4]) != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it begins with {bytes(data[:4])!r}")
    cursor.at = 4
    version = cursor.number("I")
    if version not in _VERSIONS:
        kind = "is big-endian" if version & 0xFFFF == 0 and version else f"has version {version}"
        raise CheckpointError(f"{path} {kind}; little-endian GGUF of version 2 or 3 is read")
    num_tensors, num_entries = cursor.number("Q"), cursor.number("Q")
    cursor.check_count(num_tensors, _SMALLEST_TENSOR, "tensors")
    cursor.check_count(num_entries, _SMALLEST_ENTRY, "metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = cursor.string()
        if key in metadata:
            cursor.damaged(f"the metadata has {key!r} twice")
        metadata[key] = cursor.value(cursor.number("I"))
    table: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_tensors):
        name = cursor.string()
        if name in table:
            cursor.damaged(f"the tensor {name!r} is there twice")
        axes = cursor.number("I")
        if not 1 <= axes <= _MAX_AXES:
            cursor.damaged(f"{name!r} has {axes} axes")
        shape = tuple(reversed(cursor.numbers("Q", axes)))
        if math.prod(shape) >= 1 << 62 or 0 in shape:
            cursor.damaged(f"{name!r} has the shape {list(shape)}")
        table[name] = (shape, cursor.number("I"), cursor.number("Q"))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        cursor.damaged(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: StoredTensor(shape, kind, start + offset) for name, (shape, kind, offset) in table.items()}
    return GGUFHeader(metadata, tensors)


class _Cursor:
    """Reads one value after another."""

    def __init__(self, path: Path, data: Buffer) -> None:
        self.path, self.data, self.at = path, data, 0

    def damaged(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.path} is damaged: {what}; download it again")

    def check_count(self, count: int, size: int, what: str) -> None:
        """Whether `count` things of at least `size` bytes can follow."""
        left = len(self.data) - self.at
        if count > left // size:
            raise CheckpointError(
                f"{self.path} is damaged or truncated: {count} {what} announced, and {left} bytes follow;"
                " download it again"
            )

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{code}")
        self.check_count(count, size, f"numbers of {size} bytes")
        values = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += count * size
        return values

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def string(self) -> str:
        length = self.number("Q")
        self.check_count(length, 1, "characters")
        start, self.at = self.at, self.at + length
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError:
            self.damaged(f"the text at byte {start} is not UTF-8")

    def value(self, kind: int) -> Any:
        """A metadata value; an array becomes a list."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            self.damaged(f"a metadata value has the unknown type {kind}")
        element, count = self.number("I"), self.number("Q")
        if element in _SCALARS:
            return list(self.numbers(_SCALARS[element], count))
        if element != _STRING:
            self.damaged(f"a metadata array has elements of type {element}")
        self.check_count(count, 8, "texts")
        return [self.string() for _ in range(count)]
