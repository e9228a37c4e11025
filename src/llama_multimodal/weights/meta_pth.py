"""Meta's checkpoint files: `consolidated.*.pth`, one for each model-parallel rank."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .io import FileReader, TensorInfo
from .mllama import META_IGNORED, meta_shard_axis

_MAX_PICKLE = 64 << 20  # bytes; Llama 3.2 90B needs 0.3 MB


def shard_paths(folder: Path) -> list[Path]:
    """`consolidated.pth`, or `consolidated.00.pth` and on, in the order of their ranks; empty if there is none.

    Raises:
        CheckpointError: a rank is missing.
    """
    found = {
        int(match[1]): path
        for path in folder.glob("consolidated.*.pth")
        if (match := re.fullmatch(r"consolidated\.(\d{1,3})\.pth", path.name))
    }
    if not found:
        single = folder / "consolidated.pth"
        return [single] if single.exists() else []
    for rank in range(max(found) + 1):
        if rank not in found:
            raise CheckpointError(f"{folder}: the shard consolidated.{rank:02d}.pth is missing; download it again")
    return [found[rank] for rank in sorted(found)]


class MetaShards:
    """All model-parallel shards together, as one set of tensors; `entries` by name."""

    def __init__(self, paths: list[Path]) -> None:
        """Map the files and work out the merged shapes.

        Raises:
            CheckpointError: a file is damaged or unsafe, or the shards do not fit each other.
        """
        self._shards = [_load(path) for path in paths]
        self._paths = paths
        self._readers = [FileReader(path) for path in paths]
        self._starts = [_mapped_at(path, shard) for path, shard in zip(paths, self._shards)]
        self.entries: dict[str, TensorInfo] = {}
        for shard, path in zip(self._shards, paths):
            if shard.keys() != self._shards[0].keys():
                name = min(shard.keys() ^ self._shards[0].keys())
                raise CheckpointError(f"{path.name} and {paths[0].name} do not belong together: only one has {name!r}")
        for name in self._shards[0]:
            self.entries[name] = self._merged(name)

    def _merged(self, name: str) -> TensorInfo:
        parts = [shard[name] for shard in self._shards]
        first = parts[0]
        for part, path in zip(parts, self._paths):
            if part.shape != first.shape or part.dtype != first.dtype:
                raise CheckpointError(
                    f"{path.name} and {self._paths[0].name} do not belong together: {name!r} is"
                    f" {list(part.shape)} {part.dtype} in one, {list(first.shape)} {first.dtype} in the other"
                )
        shape, axis = list(first.shape), meta_shard_axis(name)
        if len(parts) > 1 and axis is not None and axis < len(shape):
            shape[axis] *= len(parts)
        return TensorInfo(tuple(shape), first.dtype)

    def _parts(self, name: str) -> tuple[list[Tensor], int]:
        axis = meta_shard_axis(name)
        parts = [shard[name] for shard in self._shards]
        return (parts[:1], 0) if axis is None else (parts, axis)

    def tensor(self, name: str) -> Tensor:
        """A tensor whole; mapped from the file unless it has to be put together."""
        parts, axis = self._parts(name)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)

    def copy_into(self, name: str, out: Tensor) -> None:
        """Copy a tensor into `out`, which may have another shape of as many elements."""
        parts, axis = self._parts(name)
        if out.shape != self.entries[name].shape and len(parts) > 1:
            out.copy_(torch.cat(parts, dim=axis).view(out.shape))  # a permuted view; never one of the largest tensors
            return
        for i, view in enumerate(out.chunk(len(parts), axis) if len(parts) > 1 else [out]):
            self._copy(i, parts[i], view)

    def _copy(self, shard: int, part: Tensor, out: Tensor) -> None:
        start, reader = self._starts[shard], self._readers[shard]
        if start is None or not part.is_contiguous() or not reader.holds(part.data_ptr() - start, part.nbytes):
            out.copy_(part.reshape(out.shape))
        else:
            reader.copy_into(part.data_ptr() - start, part.dtype, out)


def _load(path: Path) -> dict[str, Tensor]:
    _check_zip(path)
    try:
        state = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged pickles raise almost anything
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(f"{path} cannot be loaded safely: {reason}; download it again") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a table of tensors")
    return {name: _plain(path, name, value) for name, value in state.items() if name not in META_IGNORED}


def _mapped_at(path: Path, shard: dict[str, Tensor]) -> int | None:
    """The address at which `torch.load` mapped a file, so that tensors can be read by their place in it; None where
    the system does not tell."""
    maps, address = Path("/proc/self/maps"), next((t.data_ptr() for t in shard.values() if t.numel()), 0)
    if not maps.exists():
        return None
    inode = str(path.stat().st_ino)
    for line in maps.read_text(errors="replace").splitlines():
        span, _, offset, _, of_file, *_ = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return first - int(offset, 16) if of_file == inode else None
    return None


def _plain(path: Path, name: Any, value: Any) -> Tensor:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise CheckpointError(f"{path}: {str(name)[:80]!r} is a {type(value).__name__}, not a tensor")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise CheckpointError(f"{path}: {name!r} is not a plain tensor")
    return value.detach()


def _check_zip(path: Path) -> None:
    """Refuse what is no torch archive, or would grow when unpacked."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file")
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} is not a torch archive or is truncated; download it again")
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # zipfile raises almost anything on damaged directories
        raise CheckpointError(f"{path} is damaged ({error}); download it again") from error
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or _total(members) > path.stat().st_size:
        raise CheckpointError(f"{path} is a compressed or damaged archive, as no torch checkpoint is; not opened")
    if any(m.filename.endswith("data.pkl") and m.file_size > _MAX_PICKLE for m in members):
        raise CheckpointError(f"{path} has an index of over {_MAX_PICKLE >> 20} MiB; not opened")


def _total(members: Iterable[zipfile.ZipInfo]) -> int:
    return sum(m.file_size for m in members)
