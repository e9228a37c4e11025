"""The `data:` section of a fine-tuning recipe: where conversations lie, and what is done with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...config.checks import build, check_keys, from_dict, nearest, require
from ...errors import ConfigError, DataError
from ..config import read_table


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What every kind of source may say. Paths are relative to the working directory."""

    weight: float | None = None  # its share of the rows; all sources have one, or none, and then each row comes once
    prompt: str | None = None  # what the user says beside a picture that has only a text
    system: str | None = None  # a system message for rows that have none of their own
    distill: bool = False  # its answers are not learnt: where they stand, the base's own predictions are to stay
    # The name that a column goes by here: that in the file, such as question: query.
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if one.type in ("str", "str | None") and not isinstance(value, str | None):
                raise ConfigError(f"{one.name} must be a text, not {value!r}")
        require(isinstance(self.columns, Mapping), "columns must be a table, such as question: query", self)
        require(self.weight is None or self.weight > 0, f"weight must be above 0, not {self.weight}", self)
        named = all(isinstance(name, str) for pair in self.columns.items() for name in pair)
        require(named, "columns must be a table of names, such as question: query", self)

    @property
    def place(self) -> str:
        """Where it lies, as it was given."""
        return next(getattr(self, key) for key in KINDS if hasattr(self, key))


@dataclass(frozen=True, kw_only=True)
class FileSource(SourceConfig):
    """JSON lines, a JSON list, or a table as CSV or TSV."""

    images: str | None = None  # the folder that pictures' paths start from; None: the file's own
    file: str  # or a pattern, such as data/*.jsonl


@dataclass(frozen=True, kw_only=True)
class DatasetSource(SourceConfig):
    """A data set of the `datasets` library: a folder that it saved, Parquet or Arrow files, or a name on the hub."""

    name: str | None = None  # of a configuration of the data set
    split: str = "train"
    revision: str | None = None
    streaming: bool = False  # read as it comes, without a copy on the disk
    buffer: int = 1000  # rows that a stream is shuffled among
    images: str | None = None  # the folder that pictures' paths start from
    dataset: str

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.buffer > 0, f"buffer must be at least 1, not {self.buffer}", self)


@dataclass(frozen=True, kw_only=True)
class TarSource(SourceConfig):
    """WebDataset's shards: a sample is the files of one name, pictures beside a .json or .txt."""

    tar: str  # a pattern too: shards/*.tar, or shards/{000..031}.tar


@dataclass(frozen=True, kw_only=True)
class FolderSource(SourceConfig):
    """Pictures with their captions: image.jpg beside image.txt or image.json, or all in metadata.jsonl, metadata.csv,
    captions.jsonl or captions.csv."""

    folder: str


KINDS: dict[str, type[SourceConfig]] = {
    "file": FileSource, "dataset": DatasetSource, "tar": TarSource, "folder": FolderSource,
}  # fmt: skip
"""The key that every source has, and what it then is."""


@dataclass(frozen=True)
class ChatData:
    """Where the conversations of a run come from."""

    sources: tuple[SourceConfig, ...]
    evaluation: tuple[SourceConfig, ...] = ()  # what is evaluated on; or a share of the sources:
    holdout: float = 0.0  # of every source, kept for evaluation
    seed: int = 0
    max_length: int | None = None  # tokens of a conversation, those of its pictures included; None: the model's context
    too_long: Literal["skip", "truncate"] = "skip"
    max_skipped: float = 0.01  # a run stops when more than this share of its rows cannot be used
    workers: int = 2  # processes that read, cut and tokenise ahead of the loop

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "sources is empty; name at least one", self)
        for sources in (self.sources, self.evaluation):
            weighted = sum(source.weight is not None for source in sources)
            require(weighted in (0, len(sources)), "give every source a weight, or none of them", self)
        require(0 <= self.holdout < 1, f"holdout must be a share from 0 to below 1, not {self.holdout}", self)
        require(not (self.holdout and self.evaluation), "take either holdout or evaluation", self)
        require(0 <= self.max_skipped <= 1, f"max_skipped must be a share from 0 to 1, not {self.max_skipped}", self)
        require(self.max_length is None or self.max_length > 1, "max_length must be at least 2", self)
        asked = [source for source in self.evaluation if source.distill]
        require(not asked, "evaluation asks for answers, so distill is for sources alone", self)
        taught = [source for source in self.sources if not source.distill]
        require(len(taught) > 0, "every source has distill, so there is nothing to learn; leave it out of one", self)
        known = ("skip", "truncate")
        require(self.too_long in known, f'too_long "{self.too_long}" is not one of {", ".join(known)}', self)
        streams = [source for source in self.sources if isinstance(source, DatasetSource) and source.streaming]
        apart = "a stream keeps no rows back; name other rows under evaluation instead of holdout"
        require(not (self.holdout and streams), apart, self)
        size = "a stream has no known size; give every source a weight"
        require(not streams or len(self.sources) == 1 or self.sources[0].weight is not None, size, self)


def chat_data_from_dict(raw: Mapping[str, Any], where: str) -> ChatData:
    """The section as YAML reads it. A source is a table, or a path that says by itself what it is.

    Raises:
        ConfigError: an unknown or missing key, or a value that is not possible.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where} must be a table")
    check_keys(raw, {one.name for one in dataclasses.fields(ChatData)}, where)
    if "sources" not in raw:
        raise ConfigError(f'{where}: "sources" is missing; list at least one, such as - file: chats.jsonl')
    given = dict(raw)
    for key in ("sources", "evaluation"):
        if key in given:
            listed = given[key] if isinstance(given[key], list | tuple) else [given[key]]
            given[key] = tuple(source_from(one, f"{where}: {key}[{i}]") for i, one in enumerate(listed))
    return build(ChatData, given, where)


def source_from(raw: Any, where: str) -> SourceConfig:
    """Raises:
    ConfigError: it is neither a table of one kind of source nor a path that is there.
    """
    if isinstance(raw, str):
        return source_at(raw)
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where} must be a table such as file: chats.jsonl, not {raw!r}")
    kinds = [key for key in KINDS if key in raw]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none of them"
        hint = "" if kinds else next((near for key in raw if (near := nearest(str(key), KINDS))), "")
        raise ConfigError(f"{where} needs exactly one of {', '.join(KINDS)}, and has {found}{hint}")
    return from_dict(KINDS[kinds[0]], raw, where)


def source_at(path: str) -> SourceConfig:
    """What lies at a path, told by its ending or by what the folder holds.

    Raises:
        DataError: nothing is there, or nothing that is read.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        if any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return DatasetSource(dataset=path)
        shards = any(place.glob("*.tar"))
        return TarSource(tar=str(place / "*.tar")) if shards else FolderSource(folder=path)
    kinds: dict[str, type[SourceConfig]] = {
        ".jsonl": FileSource, ".json": FileSource, ".csv": FileSource, ".tsv": FileSource, ".tar": TarSource,
        ".parquet": DatasetSource, ".arrow": DatasetSource,
    }  # fmt: skip
    kind = kinds.get(place.suffix.lower())
    if kind is None:
        raise DataError(
            f"{path} is not a file of conversations ({', '.join(kinds)}) nor a folder; a data set of the hub needs a"
            " recipe with - dataset: its name"
        )
    key = next(key for key, cls in KINDS.items() if cls is kind)
    made: SourceConfig = from_dict(kind, {key: path}, path)
    return made


def read_data(path: str | Path) -> tuple[ChatData, str | None]:
    """The `data:` section of a recipe, and the model that the recipe names.

    Raises:
        ConfigError: no such file, not YAML, no such section, or something wrong in it.
    """
    raw = read_table(path)
    if "data" not in raw:
        raise ConfigError(f"{path} has no data: section; it lists sources, such as - file: chats.jsonl")
    model = raw.get("model")
    return chat_data_from_dict(raw["data"], f"{path}: data"), model if isinstance(model, str) else None
