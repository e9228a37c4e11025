"""Samples of several files of one name: WebDataset's tars, read in any order, and folders of captioned pictures."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...processing import json_lines
from ...processing.images import ImageSource
from .skips import BadRow
from .sources import Row, Rows, file_rows, nearest_folder

PICTURE_ENDINGS = {"jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff", "ppm", "avif"}
TABLES = tuple(f"{name}.{end}" for name in ("metadata", "captions") for end in ("jsonl", "json", "csv", "tsv"))

Contents = Mapping[str, Callable[[], bytes]]
"""The files of a sample by what follows its name: jpg, json, left.png."""


def sample_row(contents: Contents, find: Callable[[str], ImageSource]) -> Row:
    """Pictures by name, and beside them a .json of any shape, or a caption as .txt.

    Raises:
        BadRow: the .json is damaged, or there is no text at all.
    """
    table: Any = {}
    if "json" in contents:
        try:
            table = json_lines.parse(contents["json"]())
        except ValueError as error:
            raise BadRow("not JSON", f"its .json is {error}") from error
        table = {"messages": table} if isinstance(table, list) else table
        if not isinstance(table, dict):
            raise BadRow("shape", "its .json must hold a table, or a list of messages")
    if "txt" in contents:
        try:
            table.setdefault("text", contents["txt"]().decode("utf-8-sig").strip())
        except UnicodeDecodeError:
            raise BadRow("unreadable", "its .txt is not UTF-8") from None
    if not table:
        raise BadRow("no text", f"there is no .json or .txt beside {', '.join(sorted(contents))}")
    pictures = [end for end in sorted(contents) if end.rpartition(".")[2] in PICTURE_ENDINGS]
    if pictures and not _names_its_own(table):
        table = {key: value for key, value in table.items() if key not in ("image", "file_name")}
        table["images"] = [contents[end]() for end in pictures]
    return Row(table, find)


def _names_its_own(table: Mapping[str, Any]) -> bool:
    """Whether messages hold their pictures' paths themselves."""
    listed = table.get("messages")
    parts = [
        part
        for message in (listed if isinstance(listed, list) else [])
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        for part in message["content"]
        if isinstance(part, Mapping)
    ]
    return any(isinstance(part.get(key), str | Mapping) for part in parts for key in ("image", "image_url", "path"))


class TarRows:
    """Shards are looked through once for where their files lie; after that any sample is a few reads away."""

    def __init__(self, shards: list[Path]) -> None:
        """Raises:
        DataError: a shard is damaged, or compressed.
        """
        self.shards = shards
        self._samples: list[tuple[int, str, list[tuple[str, int, int]]]] = []  # shard, name, (ending, place, bytes)
        for number, shard in enumerate(shards):
            try:
                with tarfile.open(shard, "r:") as tar:
                    self._add(number, tar)
            except (tarfile.TarError, OSError, EOFError) as error:
                packed = shard.suffix.lower() in (".gz", ".bz2", ".xz", ".tgz", ".zst")
                hint = "; samples are read in any order, so unpack it to a plain .tar" if packed else ""
                raise DataError(f"{shard} cannot be read as a tar: {error}{hint}") from error

    def _add(self, number: int, tar: tarfile.TarFile) -> None:
        found: dict[str, list[tuple[str, int, int]]] = {}
        for member in tar:
            folder, _, file = member.name.rpartition("/")
            name, _, end = file.partition(".")
            if member.isfile() and name and end:
                found.setdefault(f"{folder}/{name}" if folder else name, []).append(
                    (end.lower(), member.offset_data, member.size)
                )
        self._samples += [(number, name, files) for name, files in found.items()]

    @property
    def size(self) -> int:
        return len(self._samples)

    def where(self, index: int) -> str:
        number, name, _ = self._samples[index]
        return f"{self.shards[number]}:{name}"

    def read(self, index: int) -> Row:
        number, name, files = self._samples[index]
        contents = {end: self._reader(number, place, size) for end, place, size in files}

        def find(path: str) -> ImageSource:
            """A path in the sample's .json, by its last part."""
            stem, _, end = path.rpartition("/")[2].partition(".")
            if stem == name.rpartition("/")[2] and end.lower() in contents:
                return contents[end.lower()]()
            raise BadRow("picture", f"{path[:200]} is not a file of this sample: {', '.join(contents)}")

        return sample_row(contents, find)

    def _reader(self, number: int, place: int, size: int) -> Callable[[], bytes]:
        def read() -> bytes:
            try:
                with self.shards[number].open("rb") as file:
                    file.seek(place)
                    return file.read(size)
            except OSError as error:
                raise BadRow("unreadable", f"the shard cannot be read: {error.strerror}") from error

        return read


def folder_rows(folder: Path) -> Rows:
    """Raises:
    DataError: no such folder, nothing in it, or a damaged table.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}{nearest_folder(folder)}")
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(tables) > 1:
        raise DataError(f"{folder} has {' and '.join(table.name for table in tables)}; name one of them with file:")
    return file_rows(tables) if tables else FolderRows(folder)


class FolderRows:
    """Every picture below a folder, with the text of the same name beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            files = sorted(path for path in folder.rglob("*") if path.suffix[1:].lower() in PICTURE_ENDINGS)
        except OSError as error:
            raise DataError(f"{folder} cannot be read: {error.strerror}") from error
        self._pictures = [str(path.relative_to(folder)) for path in files]

    @property
    def size(self) -> int:
        return len(self._pictures)

    def where(self, index: int) -> str:
        return str(self.folder / self._pictures[index])

    def read(self, index: int) -> Row:
        picture = self.folder / self._pictures[index]
        beside = {end: picture.with_suffix(f".{end}") for end in ("json", "txt")}
        contents = {end: path.read_bytes for end, path in beside.items() if path.is_file()}
        try:
            return sample_row({**contents, picture.suffix[1:].lower(): picture.read_bytes}, picture.parent.joinpath)
        except OSError as error:
            raise BadRow("unreadable", f"it, or the text beside it, cannot be read: {error.strerror}") from error
