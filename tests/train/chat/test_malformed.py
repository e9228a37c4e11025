"""Whatever is in a file: a row is used, or skipped for a reason; nothing else happens."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from chat_for_tests import llava, meta, picture, smolvlm, write_lines
from test_shapes import SHAPES

from llama_multimodal.errors import UserError
from llama_multimodal.train.chat.config import FileSource
from llama_multimodal.train.chat.encode import encode_row
from llama_multimodal.train.chat.skips import BadRow
from llama_multimodal.train.chat.sources import JsonRows, Row, file_rows

JUNK: list[Any] = [
    None, True, 0, -1, 1.5, float("nan"), "", " ", "\x00", "\ud800", "<image>", "<|eot_id|>", "a" * 300, "../..", "/",
    "data:,", "data:image/png;base64,AAAA", "http://x", [], [[]], [None], {}, {"role": "user"}, {"type": "image"},
    {"bytes": [1]}, {"path": "a\x00b"}, [{"user": 1, "assistant": None}], {"url": {"url": {}}}, 10**30,
]  # fmt: skip


def damaged(value: Any, rng: random.Random) -> Any:
    """The value with something in it replaced, left out or doubled."""
    if rng.random() < 0.15 or not isinstance(value, list | dict) or not value:
        return rng.choice(JUNK)
    if isinstance(value, list):
        copy, place = list(value), rng.randrange(len(value))
        act = rng.random()
        if act < 0.2:
            del copy[place]
        elif act < 0.4:
            copy.insert(place, rng.choice([*JUNK, copy[place]]))
        else:
            copy[place] = damaged(copy[place], rng)
        return copy
    key, act = rng.choice(list(value)), rng.random()
    if act < 0.2:
        return {k: v for k, v in value.items() if k != key}
    if act < 0.3:
        return {**value, rng.choice(["image", "images", "text", "texts", "system", "from", "index"]): rng.choice(JUNK)}
    return {**value, key: damaged(value[key], rng)}


@pytest.mark.parametrize("make", [meta, llava, smolvlm])
def test_damaged_rows(make: Any, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.jpg")
    rng, processor = random.Random(5), make()
    kinds: dict[str, int] = {}
    for number in range(1500):
        row = rng.choice(list(SHAPES.values()))[0]
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            row = damaged(row, rng)
        source = FileSource(file="f", prompt=rng.choice([None, "what is this?"]))
        try:
            example = encode_row(Row(row, lambda name: tmp_path / name), "here", source, processor, longest=200)
            assert example.num_learnt and len(example.labels) == len(example.tokens)
            kinds["used"] = kinds.get("used", 0) + 1
        except BadRow as error:
            kinds[error.kind] = kinds.get(error.kind, 0) + 1
        except Exception as error:
            raise AssertionError(f"row {number}: {row!r}") from error
    assert {"used", "picture", "shape", "role", "empty answer", "no answer"} <= kinds.keys()


def test_damaged_lines(tmp_path: Path) -> None:
    """Bytes are cut out, doubled and overwritten in lines and in a list."""
    rng = random.Random(3)
    rows = [row for row, _, _ in SHAPES.values()]
    for name in ("a.jsonl", "a.json"):
        path = tmp_path / name
        whole = path.with_suffix(".whole")
        write_lines(whole, rows) if name == "a.jsonl" else whole.write_text(json.dumps(rows, indent=1))
        for _ in range(150):
            text = bytearray(whole.read_bytes())
            for _ in range(rng.randint(1, 8)):
                place = rng.randrange(len(text))
                act = rng.random()
                if act < 0.3:
                    del text[place : place + rng.randint(1, 30)]
                elif act < 0.6:
                    text[place:place] = text[place : place + rng.randint(1, 30)]
                else:
                    text[place] = rng.randrange(256)
            path.write_bytes(text)
            try:
                found = file_rows([path])
            except UserError as error:
                assert name == "a.json" and "\n" not in str(error)
                continue
            assert isinstance(found, JsonRows)
            for i in range(found.size):
                try:
                    found.read(i)
                except BadRow as error:
                    assert str(error) and found.where(i).startswith(str(path))
