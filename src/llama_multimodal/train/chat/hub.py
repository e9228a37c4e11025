"""Data sets of the `datasets` library: saved folders, Parquet and Arrow files, names on the hub; at hand or streamed.

Rows are read as plain tables: pictures stay the bytes or paths that they are stored as until they are opened.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...config import nearest
from ...errors import DataError, MissingExtraError
from .config import DatasetSource
from .order import slot
from .sources import Row, Rows, find_files, in_folder

_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}


def open_dataset(source: DatasetSource, seed: int = 0) -> Rows:
    """Raises:
    DataError: it is not there, has no such split, or the hub cannot be reached.
    MissingExtraError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("data", f"the data set {source.dataset}") from error
    path = Path(source.dataset).expanduser()
    folder = Path(source.images).expanduser() if source.images else path if path.is_dir() else path.parent
    try:
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                loaded = _pick(loaded, source)
            if source.streaming:
                loaded = loaded.to_iterable_dataset()
        elif path.suffix.lower() in _BUILDERS or "*" in source.dataset:
            files = find_files(source.dataset)
            if (builder := _BUILDERS.get(files[0].suffix.lower())) is None:
                raise DataError(f"{files[0]} is not a file that is read as a data set: {', '.join(_BUILDERS)}")
            names = {source.split: [str(file) for file in files]}
            loaded = datasets.load_dataset(
                builder, data_files=names, split=source.split, streaming=source.streaming
            )  # fmt: skip
        else:
            loaded = datasets.load_dataset(
                source.dataset, source.name, split=source.split, revision=source.revision, streaming=source.streaming
            )  # fmt: skip
            folder = Path(source.images).expanduser() if source.images else Path()
    except DataError:
        raise
    except Exception as error:  # of its own, of the hub's client, of pyarrow
        raise DataError(_why(source, error)) from error
    table = loaded.with_format("arrow")  # as it is stored
    if source.streaming:
        return StreamRows(source, table, folder, seed)
    return DatasetRows(source, table, folder)


def _pick(splits: Any, source: DatasetSource) -> Any:
    if source.split not in splits:
        names = ", ".join(splits)
        raise DataError(
            f'{source.dataset} has no split "{source.split}"{nearest(source.split, splits)}; it has {names}'
        )
    return splits[source.split]


def _why(source: DatasetSource, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    hint = ""
    if isinstance(error, ConnectionError | TimeoutError):
        hint = "; check the network, or save it with save_to_disk where there is one and give the folder"
    return f"the data set {source.dataset} cannot be loaded: {reason}{hint}"


class DatasetRows:
    """A data set at hand."""

    def __init__(self, source: DatasetSource, table: Any, folder: Path) -> None:
        self.source, self.folder, self._table = source, folder, table

    @property
    def size(self) -> int:
        return len(self._table)

    def where(self, index: int) -> str:
        return f"{self.source.dataset} [{self.source.split}], row {index + 1}"

    def read(self, index: int) -> Row:
        return Row(self._table[index].to_pylist()[0], in_folder(self.folder))


class StreamRows:
    """A data set that is read as it comes, shuffled among the `buffer` rows that wait.

    A row is found by its place in that order, and reading one before the last starts anew: a run that is resumed reads,
    and drops, what it had before. Every process and every worker reads the whole stream and uses its share.
    """

    size = None

    def __init__(self, source: DatasetSource, table: Any, folder: Path, seed: int) -> None:
        self.source, self.folder, self.seed, self._table = source, folder, seed, table
        self._coming: Iterator[tuple[int, Any]] | None = None
        self._next = self._number = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_coming": None}

    def where(self, index: int) -> str:
        """Of the row read last, its number in the stream."""
        return f"{self.source.dataset} [{self.source.split}], row {self._number + 1}"

    def read(self, index: int) -> Row:
        """Raises:
        DataError: the stream breaks off, or is empty.
        """
        if self._coming is None or index < self._next:
            self._coming, self._next = self._order(), 0
        self._number, table = next(itertools.islice(self._coming, index - self._next, None))
        self._next = index + 1
        return Row(table.to_pylist()[0], in_folder(self.folder))

    def _order(self) -> Iterator[tuple[int, Any]]:
        """(number in the stream, row), epoch after epoch."""
        for epoch in itertools.count():
            waiting: list[tuple[int, Any]] = []
            taken = 0
            for one in self._epoch():
                if len(waiting) < self.source.buffer:
                    waiting.append(one)
                    continue
                place = slot(len(waiting), self.seed, epoch, taken)
                taken += 1
                yield waiting[place]
                waiting[place] = one
            if not waiting:
                raise DataError(f"{self.source.dataset} [{self.source.split}] has no rows")
            while waiting:
                yield waiting.pop(slot(len(waiting), self.seed, epoch, taken))
                taken += 1

    def _epoch(self) -> Iterator[tuple[int, Any]]:
        number = 0
        try:
            # Not the data set's own iterator, which in a worker of PyTorch's gives that worker's share alone.
            for table in self._table.iter(batch_size=1):
                yield number, table
                number += 1
        except Exception as error:
            raise DataError(f"after {number} rows: {_why(self.source, error)}") from error
