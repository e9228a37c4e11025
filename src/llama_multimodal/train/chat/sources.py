"""Rows by number, from files: JSON lines, a JSON list, CSV; and what all kinds of sources have in common."""

from __future__ import annotations

import csv
import glob
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...config import nearest
from ...errors import DataError
from ...processing import json_lines
from ...processing.images import ImageSource
from ...processing.json_lines import BOM
from .config import DatasetSource, FileSource, FolderSource, SourceConfig, TarSource
from .skips import BadRow


@dataclass(frozen=True)
class Row:
    """What a file says, before its shape is known. find: the picture that a path in it means"""

    table: Any
    find: Callable[[str], ImageSource]


class Rows(Protocol):
    """A source's rows. They are read where they are needed: a worker gets the source, not the rows."""

    @property
    def size(self) -> int | None:
        """None for a stream, whose rows come one after the other."""

    def where(self, index: int) -> str:
        """File and line, for people."""

    def read(self, index: int) -> Row:
        """Raises:
        BadRow: it cannot be read.
        """


def open_source(source: SourceConfig, seed: int = 0) -> Rows:
    """seed: of the order of a stream's rows

    Raises:
    DataError: it is not there, is damaged, or holds no rows.
    MissingExtraError: it needs a package that is not installed.
    """
    rows: Rows
    if isinstance(source, FileSource):
        rows = file_rows(find_files(source.file), source.images)
    elif isinstance(source, TarSource):
        from .samples import TarRows

        rows = TarRows(find_files(source.tar))
    elif isinstance(source, FolderSource):
        from .samples import folder_rows

        rows = folder_rows(Path(source.folder).expanduser())
    else:
        assert isinstance(source, DatasetSource)
        from .hub import open_dataset

        rows = open_dataset(source, seed)
    if rows.size == 0:
        raise DataError(f"{source.place} has no rows")
    return rows


def find_files(pattern: str) -> list[Path]:
    """The files that a path or a pattern means, by name. `{000..031}` counts.

    Raises:
        DataError: there are none.
    """
    found: list[Path] = []
    for one in _counted(str(Path(pattern).expanduser())):
        path = Path(one)
        matches = [path] if path.is_file() else sorted(Path(name) for name in glob.glob(one, recursive=True))
        matches = [match for match in matches if match.is_file()]
        if not matches:
            if path.is_dir():
                raise DataError(f"{one} is a folder; give a file, or a pattern such as {one}/*")
            beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(f"there is no file {one}{nearest(path.name, beside)}")
        found += matches
    return found


def _counted(pattern: str) -> Iterator[str]:
    """`a{00..02}` as a00, a01 and a02."""
    pieces = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    ranges = [
        [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
        for first, last in zip(pieces[1::3], pieces[2::3])
    ]
    for numbers in itertools.product(*ranges):
        yield "".join(itertools.chain.from_iterable(itertools.zip_longest(pieces[::3], numbers, fillvalue="")))


def in_folder(folder: Path) -> Callable[[str], ImageSource]:
    """How pictures' paths are read: from a folder, unless they are absolute."""
    return lambda name: folder / name


def file_rows(files: list[Path], images: str | None = None) -> Rows:
    """Rows of JSON lines, JSON lists, CSV or TSV. images: where pictures' paths start; None: the file's own folder

    Raises:
        DataError: a file of another kind, or damaged.
    """
    folder = None if images is None else Path(images).expanduser()
    if folder is not None and not folder.is_dir():
        raise DataError(f"there is no folder {folder} of images{nearest_folder(folder)}")
    tables = {file.suffix.lower() in (".csv", ".tsv") for file in files}
    if len(tables) > 1:
        raise DataError("JSON and CSV files cannot be mixed in one source; make a source of each")
    return CsvRows(files, folder) if True in tables else JsonRows(files, folder)


def nearest_folder(folder: Path) -> str:
    """A hint at a folder of like name beside one that is not there."""
    beside = [other.name for other in folder.parent.iterdir() if other.is_dir()] if folder.parent.is_dir() else []
    return nearest(folder.name, beside)


class JsonRows:
    """Where each row's text lies is found once; the text itself is read and understood when its turn comes."""

    def __init__(self, files: list[Path], folder: Path | None = None) -> None:
        self.files, self.folder = files, folder
        spans = [_spans(file) for file in files]
        self._first = np.cumsum([0, *map(len, spans)])
        self._spans = np.concatenate(spans)  # [rows, 3]: first byte, number of bytes, line (or negative: place in list)

    @property
    def size(self) -> int:
        return len(self._spans)

    def _file(self, index: int) -> Path:
        return self.files[int(np.searchsorted(self._first, index, side="right")) - 1]

    def where(self, index: int) -> str:
        line = int(self._spans[index, 2])
        return f"{self._file(index)}:{line}" if line > 0 else f"{self._file(index)}, row {-line}"

    def read(self, index: int) -> Row:
        file, (begin, length, _) = self._file(index), self._spans[index].tolist()
        try:
            with file.open("rb") as opened:
                opened.seek(begin)
                table = json_lines.parse(opened.read(length))
        except OSError as error:
            raise BadRow("unreadable", f"the file cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise BadRow("not JSON", str(error)) from error
        return Row(table, in_folder(self.folder or file.parent))


_SPACE = re.compile(r"[ \t\r\n]*")


def _spans(file: Path) -> np.ndarray:
    """Where the rows of a file lie: of JSON lines, or of a list over any number of lines."""
    try:
        with file.open("rb") as opened:
            begin = len(BOM) if opened.read(len(BOM)) == BOM else 0
            opened.seek(begin)
            listed = file.suffix.lower() == ".json" and opened.read(4096).lstrip()[:1] == b"["
            opened.seek(begin if listed else 0)
            if not listed:
                spans = [(first, len(line), number) for number, first, line in json_lines.rows(opened)]
                if file.suffix.lower() == ".json" and spans:
                    _require_lines(file, spans[0])
                return np.array(spans, np.int64).reshape(-1, 3)
            text = opened.read().decode("utf-8")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    return np.array(list(_list_spans(text, begin, file)), np.int64).reshape(-1, 3)


def _require_lines(file: Path, span: tuple[int, int, int]) -> None:
    """Refuse a table spread over lines, each of which would be a bad row."""
    with file.open("rb") as opened:
        opened.seek(span[0])
        try:
            json_lines.parse(opened.read(span[1]))
        except ValueError:
            raise DataError(
                f"{file} is neither a list of rows nor one row a line; write it as [row, row, …], or as JSON lines"
            ) from None


def _list_spans(text: str, begin: int, file: Path) -> Iterator[tuple[int, int, int]]:
    """The rows of a list, whose text starts at byte `begin`."""
    decoder = json.JSONDecoder()
    place = counted = _SPACE.match(text, _SPACE.match(text).end() + 1).end()  # type: ignore[union-attr]
    byte, number = begin + len(text[:place].encode()), 0
    try:
        while text[place : place + 1] != "]" or number:
            end = decoder.raw_decode(text, place)[1]
            number += 1
            byte += len(text[counted:place].encode())
            length = len(text[place:end].encode())
            yield byte, length, -number
            byte, counted = byte + length, end
            place = _SPACE.match(text, end).end()  # type: ignore[union-attr]
            if text[place : place + 1] == "]":
                return
            if text[place : place + 1] != ",":
                raise json.JSONDecodeError("a comma is missing", text, place)
            place = _SPACE.match(text, place + 1).end()  # type: ignore[union-attr]
    except RecursionError:
        raise DataError(f"{file}: row {number + 1} has lists within lists, too deep to read") from None
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}") from error


class CsvRows:
    """A table with a line of names at its head."""

    def __init__(self, files: list[Path], folder: Path | None = None) -> None:
        self.files, self.folder = files, folder
        self._rows: list[tuple[int, int, dict[str, Any]]] = []  # file, line, columns
        for number, file in enumerate(files):
            try:
                with file.open(encoding="utf-8-sig", newline="") as opened:
                    reader = csv.DictReader(opened, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
                    self._rows += [(number, reader.line_num, row) for row in reader]
            except (OSError, UnicodeDecodeError, csv.Error) as error:
                raise DataError(f"{file} cannot be read as a table: {error}") from error

    @property
    def size(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        number, line, _ = self._rows[index]
        return f"{self.files[number]}:{line}"

    def read(self, index: int) -> Row:
        number, _, row = self._rows[index]
        if None in row or None in row.values():
            raise BadRow("shape", "the line has more or fewer fields than the table's head")
        return Row(row, in_folder(self.folder or self.files[number].parent))
