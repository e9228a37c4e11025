"""Rows that a model is calibrated on: texts, conversations and pictures of a user's own, or the embedded model's world.

What is read: a `.jsonl` file with a table a line, or a folder of such files, of texts (`.txt`, `.md`) and of pictures.
A line is {"text": "…"}, {"messages": […]} as the processor takes them, or {"image": "a.png", "question": "…",
"answer": "…"}, the last two as wanted; pictures lie beside the file. `world` renders the training part of the world.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError, PromptError, UserError
from .inputs import ModelInputs
from .processing import json_lines
from .processing.processor import Processor
from .zoo.world import sample

WORLD = "world"
_TEXTS, _PICTURES = (".txt", ".md"), (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
_QUESTION = "Describe the picture."

T = TypeVar("T")


@dataclass(frozen=True)
class CalibrationRows:
    """rows: batches of one row each. skipped: why others could not be used, a line each."""

    rows: list[ModelInputs]
    skipped: list[str]


@dataclass(frozen=True)
class _Raw:
    where: str
    text: str = ""
    messages: Sequence[Any] = ()


def calibration_rows(source: str | Path, processor: Processor, count: int = 256, length: int = 512) -> CalibrationRows:
    """At most `count` rows, spread evenly over all that there are.

    source: a `.jsonl` file, a folder, or `world`
    length: tokens of a piece that a text is cut into; conversations stay whole

    Raises:
        ConfigError: nothing there, or no row that can be used.
    """
    raw = list(_world(count) if source == WORLD else _read(Path(source).expanduser()))
    chosen = _evenly(raw, count)
    rows: list[ModelInputs] = []
    skipped = []
    for number, one in enumerate(chosen):
        wanted = (count - len(rows)) // (len(chosen) - number)
        try:
            rows += _encoded(one, processor, max(1, wanted), length)
        except UserError as error:
            skipped.append(f"{one.where}: {error}")
    if not rows:
        why = skipped[0] if skipped else "it has no text, no conversation and no picture"
        raise ConfigError(f"{source} holds no row to calibrate on; {why}")
    return CalibrationRows(rows, skipped)


def _evenly(items: list[T], count: int) -> list[T]:
    if len(items) <= count:
        return items
    return [items[i * len(items) // count] for i in range(count)]


def _encoded(raw: _Raw, processor: Processor, most: int, length: int) -> list[ModelInputs]:
    """A conversation as one row, or a text as `most` pieces of it."""
    if raw.messages:
        return [processor(raw.messages)]
    tokenizer = processor.tokenizer
    if tokenizer is None:
        raise PromptError("the checkpoint has no tokenizer, and text needs one")
    prefix, ids = tokenizer.prefix, tokenizer.encode(raw.text)
    size = min(length, processor.config.text.max_position_embeddings) - len(prefix)
    pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
    whole = [piece for piece in pieces if len(piece) == size]  # what is left at the end of a long text is no row
    return [processor.encode_tokens([[*prefix, *piece]]) for piece in _evenly(whole or pieces, most)]


def _world(count: int) -> Iterator[_Raw]:
    for seed in range(count):
        drawn = sample(seed, split="train")
        messages: list[dict[str, Any]] = []
        for turn in drawn.turns:
            messages += _asked(None if messages else drawn.image, turn.question, turn.answer)
        yield _Raw(f"sample {seed}", messages=messages)


def _asked(image: Any, question: str, answer: str | None) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": question}]
    if image is not None:
        content.insert(0, {"type": "image", "image": image})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def _read(path: Path) -> Iterator[_Raw]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file() and file.suffix.lower() in (".jsonl", *_TEXTS, *_PICTURES):
                yield from _read_file(file)
    elif path.is_file() and path.suffix.lower() == ".jsonl":
        yield from _read_file(path)
    else:
        state = "is no .jsonl file" if path.exists() else "is not there"
        raise ConfigError(f'{path} {state}; calibration takes a .jsonl file, a folder, or the word "{WORLD}"')


def _read_file(file: Path) -> Iterator[_Raw]:
    if file.suffix.lower() in _PICTURES:
        yield _Raw(str(file), messages=_asked(file, _QUESTION, None))
        return
    try:
        if file.suffix.lower() in _TEXTS:
            if (text := file.read_text(encoding="utf-8")).strip():
                yield _Raw(str(file), text)
            return
        with file.open("rb") as opened:
            for number, _, line in json_lines.rows(opened):
                yield _line(line, f"{file.name}, line {number}", file.parent)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as text: {error}") from error


def _line(line: bytes, where: str, folder: Path) -> _Raw:
    """Raises ConfigError for a line that is no row, so that a file of another kind is noticed."""
    try:
        table = json_lines.parse(line)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    if isinstance(table, Mapping):
        if isinstance(table.get("messages"), list) and table["messages"]:
            return _Raw(where, messages=[_beside(message, folder) for message in table["messages"]])
        if isinstance(table.get("image"), str):
            question, answer = table.get("question", _QUESTION), table.get("answer")
            return _Raw(where, messages=_asked(folder / table["image"], question, answer))
        if isinstance(table.get("text"), str) and table["text"]:
            return _Raw(where, table["text"])
    raise ConfigError(f'{where} has neither "text" nor "messages" nor "image"')


def _beside(message: Any, folder: Path) -> Any:
    """A message whose pictures' paths are taken from the file's folder."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    parts = [
        {**part, "image": folder / part["image"]}
        if isinstance(part, Mapping) and isinstance(part.get("image"), str)
        else part
        for part in message["content"]
    ]
    return {**message, "content": parts}
