"""Safetensors files: checked headers, tensors mapped from disk, streaming writes.

The header is validated against the file's size before anything is allocated.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_OTHER_SIZES = {"U16": 2, "U32": 4, "U64": 8, "C64": 8, "F8_E8M0": 1}  # valid in the format, never weights of ours

_MAX_HEADER = 16 << 20  # bytes; Llama 3.2 90B needs 0.2 MB
_MAX_JSON = 16 << 20
_PIECE = 2 << 20  # bytes copied at a time


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# --- reading ---------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A table from a JSON file.

    Raises:
        ConfigError: it cannot be read, is not JSON, or is not a table.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"{path} is not a file")
        if path.stat().st_size > _MAX_JSON:
            raise ConfigError(f"{path} is {path.stat().st_size >> 20} MiB, too large for a configuration")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a table, not {type(value).__name__}")
    return value


class SafetensorsFile:
    """One open file; `entries` by name. Tensors stay valid as long as something refers to them."""

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Raises:
            CheckpointError: not a safetensors file, or damaged, or truncated.
        """
        self.path = path
        self.entries: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        try:
            if not path.is_file():
                raise CheckpointError(f"{path} is {'not a file' if path.exists() else 'missing'}")
            with open(path, "rb") as file:
                self._read_header(file, os.fstat(file.fileno()).st_size)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._reader = FileReader(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error

    def _read_header(self, file: IO[bytes], size: int) -> None:
        start = file.read(9)
        # A header's length may begin with the same two bytes, but then the header follows it.
        if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and start[8:] != b"{":
            raise CheckpointError(f"{self.path} is a pickle and not a safetensors file; not opened; convert it first")
        if len(start) < 8:
            raise CheckpointError(f"{self.path} is {size} bytes long, too short for a safetensors file")
        (length,) = struct.unpack("<Q", start[:8])
        if length > _MAX_HEADER or 8 + length > size:
            raise CheckpointError(
                f"{self.path} is not a safetensors file or is truncated: a header of {length} bytes in a file of {size}"
            )
        file.seek(8)
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path} has a damaged header ({error}); download it again") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path} has a damaged header (not a table); download it again")
        data = 8 + length
        spans = []
        for name, entry in header.items():
            if name != "__metadata__":
                spans.append((*self._span(name, entry), name))
        end = 0
        for first, last, name in sorted(spans):
            if first != end:
                raise CheckpointError(f"{self.path} is damaged: {name!r} begins at {first}, not at {end}")
            end = last
            self._offsets[name] = data + first
        if data + end != size:
            state = "truncated" if data + end > size else "damaged"
            raise CheckpointError(f"{self.path} is {state}: {data + end} bytes expected, {size} found; get it again")

    def _span(self, name: str, entry: Any) -> tuple[int, int]:
        """Check one entry; returns its first byte and the byte after its last."""
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise CheckpointError(f"{self.path}: the header's entry {name!r} is damaged")
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [-1]
        if any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers) or len(offsets) != 2 or len(shape) > 32:
            raise CheckpointError(f"{self.path}: the header's entry {name!r} is damaged")
        if not isinstance(kind, str) or (kind not in DTYPES and kind not in _OTHER_SIZES):
            raise CheckpointError(f"{self.path}: {name!r} has the unknown dtype {str(kind)[:40]!r}")
        itemsize = DTYPES[kind].itemsize if kind in DTYPES else _OTHER_SIZES[kind]
        first, last = offsets
        if last - first != math.prod(shape) * itemsize:
            raise CheckpointError(f"{self.path} is damaged: {name!r} has {last - first} bytes for {kind} {shape}")
        self.entries[name] = TensorInfo(tuple(shape), DTYPES.get(kind, torch.bool))
        return first, last

    def copy_into(self, name: str, out: Tensor) -> None:
        """Copy a tensor into `out`, which has as many elements."""
        self._reader.copy_into(self._offsets[name], self.entries[name].dtype, out)

    def tensor(self, name: str) -> Tensor:
        """A tensor that lies in the file's pages; with a storage of its own."""
        info = self.entries[name]
        if info.num_bytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=info.num_bytes, offset=self._offsets[name])
        if raw.data_ptr() % info.dtype.itemsize:  # the format does not promise alignment
            raw = raw.clone()
        return raw.view(info.dtype).view(info.shape)


class FileReader:
    """Copies stretches of one file into tensors without a second copy of them in memory.

    Reading beats mapping by far: no page fault for each 4 KiB of the source, and the target can have huge pages.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed with this object)
        weakref.finalize(self, self._file.close)
        self._buffer: Tensor | None = None

    def holds(self, offset: int, num_bytes: int) -> bool:
        """Whether the file has such a stretch."""
        return offset >= 0 and offset + num_bytes <= os.fstat(self._file.fileno()).st_size

    def copy_into(self, offset: int, dtype: torch.dtype, out: Tensor) -> None:
        """Fill `out`, of any strides, dtype and device, with the elements of `dtype` that begin at byte `offset`.

        Raises:
            CheckpointError: the file ends too early.
        """
        if out.numel() == 0:
            return
        if out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous():
            self._read(offset, out)
            return
        if out.is_contiguous():
            out = out.view(-1)
        row = out[0].numel() * dtype.itemsize if out.ndim else dtype.itemsize
        for piece in out.split(max(1, _PIECE // row)) if out.ndim else [out]:
            buffer = self._staging(piece.numel() * dtype.itemsize).view(dtype).view(piece.shape)
            self._read(offset, buffer)
            piece.copy_(buffer)
            offset += buffer.numel() * dtype.itemsize

    def _staging(self, num_bytes: int) -> Tensor:
        """One buffer for all pieces: a fresh one each time would leave holes between the parameters."""
        if self._buffer is None or self._buffer.numel() < num_bytes:
            self._buffer = torch.empty(max(num_bytes, _PIECE), dtype=torch.uint8)
        return self._buffer[:num_bytes]

    def _read(self, offset: int, out: Tensor) -> None:
        left = memoryview(out.view(-1).view(torch.uint8).numpy().data)
        self._file.seek(offset)
        while left.nbytes:
            count = self._file.readinto(left)
            if not count:
                raise CheckpointError(f"{self.path} ends {left.nbytes} bytes too early; download it again")
            left = left[count:]


# --- writing ---------------------------------------------------------------------------------------------------------


def write_safetensors(path: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a file from tensors that come one at a time, in the order of `infos`, and flush it to disk.

    infos: name → shape and dtype, wider dtypes first, so that every tensor is aligned.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in infos.items():
        span = [offset, offset + info.num_bytes]
        header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (expected, info), (name, tensor) in zip(infos.items(), tensors, strict=True):
            assert name == expected and tuple(tensor.shape) == info.shape and tensor.dtype == info.dtype
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        flush(file)


def flush(file: IO[Any]) -> None:
    """Push a file's bytes to the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Push a folder's names to the disk, where the system has that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON and flush it to disk."""
    with open(path, "wb") as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())
        flush(file)
