"""Every shape that conversations have in files, and what is said of rows that have none."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from chat_for_tests import picture

from llama_multimodal.train.chat.config import FileSource
from llama_multimodal.train.chat.shapes import Conversation, conversation
from llama_multimodal.train.chat.skips import BadRow

QUESTION, ANSWER = "what is this?", "a cat"


def found(row: Any, **settings: Any) -> Conversation:
    return conversation(row, FileSource(file="f", **settings), lambda name: f"folder/{name}")


def flat(row: Any, **settings: Any) -> list[tuple[str, list[Any]]]:
    """Role and parts of every message: texts as they are, a picture as a list of what is to be opened."""
    return [
        (message["role"], [[part["image"]] if part["type"] == "image" else part["text"] for part in message["content"]])
        for message in found(row, **settings).messages
    ]


def problem(row: Any, **settings: Any) -> tuple[str, str]:
    with pytest.raises(BadRow) as caught:
        found(row, **settings)
    assert "\n" not in str(caught.value)
    return caught.value.kind, str(caught.value)


ONE = [("user", [["folder/a.jpg"], QUESTION]), ("assistant", [ANSWER])]
TEXT = [("user", [QUESTION]), ("assistant", [ANSWER])]
SAID = {"role": "assistant", "content": ANSWER}


def asking(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


PART = {"type": "text", "text": QUESTION}
SHAPES: dict[str, tuple[Any, str, Any]] = {
    "OpenAI, text": ({"messages": [{"role": "user", "content": QUESTION}, SAID]}, "messages", TEXT),
    "OpenAI, image_url": (
        {"messages": [asking({"type": "image_url", "image_url": {"url": "a.jpg"}}, PART), SAID]}, "messages", ONE,
    ),
    "OpenAI, responses": (
        {"messages": [asking({"type": "input_image", "image_url": "a.jpg"}, {**PART, "type": "input_text"}), SAID]},
        "messages", ONE,
    ),
    "parts with an image": ({"messages": [asking({"type": "image", "image": "a.jpg"}, PART), SAID]}, "messages", ONE),
    "parts with a path": ({"messages": [asking({"type": "image", "path": "a.jpg"}, PART), SAID]}, "messages", ONE),
    "parts and a column": (
        {"messages": [asking({"type": "image"}, PART), SAID], "images": ["a.jpg"]}, "messages", ONE,
    ),
    "parts with an index, nulls": (
        {
            "messages": [asking({"type": "image", "index": 0, "text": None}, {**PART, "index": None}), SAID],
            "images": [{"bytes": None, "path": "a.jpg"}],
        },
        "messages", ONE,
    ),
    "marks and a column": (
        {"messages": [{"role": "user", "content": f"<image>{QUESTION}"}, SAID], "images": ["a.jpg"]}, "messages", ONE,
    ),
    "a bare list": ([{"role": "user", "content": QUESTION}, SAID], "messages", TEXT),
    "LLaVA": (
        {
            "id": 1, "image": "a.jpg",
            "conversations": [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}],
        },
        "conversations", ONE,
    ),
    "LLaVA, text alone": (
        {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
        "conversations", TEXT,
    ),
    "turns": ({"images": ["a.jpg"], "texts": [{"user": QUESTION, "assistant": ANSWER, "source": "x"}]}, "texts", ONE),
    "question and answer": ({"image": "a.jpg", "question": QUESTION, "answer": ANSWER}, "question+answer", ONE),
    "prompt and completion": ({"prompt": QUESTION, "completion": ANSWER}, "prompt+completion", TEXT),
    "Alpaca": (
        {"instruction": QUESTION, "input": "this", "output": ANSWER}, "instruction+output",
        [("user", [f"{QUESTION}\nthis"]), ("assistant", [ANSWER])],
    ),
    "Alpaca, empty input": ({"instruction": QUESTION, "input": "", "output": ANSWER}, "instruction+output", TEXT),
    "caption": ({"image": "a.jpg", "text": ANSWER}, "text", [("user", [["folder/a.jpg"]]), ("assistant", [ANSWER])]),
    "image folder": (
        {"file_name": "a.jpg", "caption": ANSWER}, "caption", [("user", [["folder/a.jpg"]]), ("assistant", [ANSWER])],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    row, shape, expected = SHAPES[name]
    assert flat(row) == expected
    assert found(row).shape == shape


def test_pictures_take_the_places_that_are_marked_for_them() -> None:
    row = {
        "image": ["a.jpg", "b.jpg"],
        "conversations": [
            {"from": "human", "value": "first <image> then"}, {"from": "gpt", "value": "yes"},
            {"from": "human", "value": "and\n<image>"}, {"from": "gpt", "value": "no"},
        ],
    }  # fmt: skip
    assert flat(row) == [
        ("user", ["first ", ["folder/a.jpg"], " then"]), ("assistant", ["yes"]),
        ("user", ["and", ["folder/b.jpg"]]), ("assistant", ["no"]),
    ]  # fmt: skip
    parts = [{"type": "image", "index": 1}, {"type": "image", "index": 0}, PART]
    assert flat({"messages": [asking(*parts), SAID], "images": ["a.jpg", "b.jpg"]})[0] == (
        "user", [["folder/b.jpg"], ["folder/a.jpg"], QUESTION],
    )  # fmt: skip
    assert flat({"image": ["a.jpg", "b.jpg"], "question": QUESTION, "answer": ANSWER})[0] == (
        "user", [["folder/a.jpg"], ["folder/b.jpg"], QUESTION],
    )  # fmt: skip


def test_a_mark_is_text_where_there_are_no_pictures() -> None:
    row = {"messages": [{"role": "user", "content": "what does <image> mean?"}, SAID]}
    assert flat(row)[0] == ("user", ["what does <image> mean?"])


def test_bytes_and_data_urls() -> None:
    file = io.BytesIO()
    picture().save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    for given in (file.getvalue(), url, {"url": url}, {"bytes": file.getvalue(), "path": "a.png"}):
        assert flat({"image": given, "text": ANSWER})[0] == ("user", [[file.getvalue()]])
    part = {"type": "image_url", "image_url": {"url": url}}
    assert flat({"messages": [asking(part, PART), SAID]})[0][1][0] == [file.getvalue()]


def test_what_a_source_adds() -> None:
    assert flat({"image": "a.jpg", "text": ANSWER}, prompt=QUESTION) == ONE
    assert flat({"text": ANSWER}, prompt=QUESTION) == TEXT
    row = {"question": QUESTION, "answer": ANSWER}
    assert flat(row, system="be brief") == [("system", ["be brief"]), *TEXT]
    assert flat({**row, "system": "own"}, system="be brief") == [("system", ["own"]), *TEXT]
    own = {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": QUESTION}, SAID]}
    assert flat(own, system="be brief") == [("system", ["own"]), *TEXT]
    renamed = {"photo": "a.jpg", "query": QUESTION, "label": ANSWER, "text": "not this"}
    assert flat(renamed, columns={"image": "photo", "question": "query", "answer": "label"}) == ONE
    kind, message = problem(renamed, columns={"question": "querry"})
    assert kind == "shape" and 'no column "querry"; did you mean "query"?' in message


def test_answers_that_are_not_learnt() -> None:
    first = {**SAID, "weight": 0}
    asked = {"role": "user", "content": QUESTION}
    for switched in (first, {**SAID, "train": False}, {**SAID, "learn": False}):
        learn = [message["learn"] for message in found([asked, switched, asked, SAID]).messages]
        assert learn == [True, False, True, True]
    assert [m["learn"] for m in found([asked, {**SAID, "weight": 1}]).messages] == [True, True]
    pair = {"prompt": [asked, SAID, asked], "completion": [SAID]}
    assert [m["learn"] for m in found(pair).messages] == [False, False, False, True]
    assert problem([asked, first])[0] == "no answer"


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        (3, "shape", "a row must be a table of columns, not a number"),
        ({"foo": 1, "bar": 2}, "shape", "no known shape: the columns are foo, bar; known: messages, conv"),
        ({}, "shape", "the columns are none"),
        ([], "shape", "a list of messages, not an empty one"),
        ({"messages": "hi"}, "shape", "messages must be a list of messages, not a text"),
        ([{"role": "usr", "content": "a"}], "role", 'unknown role "usr"; did you mean "user"?'),
        ([{"content": "a"}], "role", 'message 1 has no "role"'),
        ([{"role": 3, "content": "a"}], "role", 'unknown role "3"'),
        ([{"role": "user"}], "shape", 'message 1 has no "content"'),
        ([{"role": "user", "content": 7}], "shape", "a text or a list of parts, not a number"),
        ([asking({"type": "video"})], "shape", 'unknown type of content "video"'),
        ([asking({"type": "text", "text": None})], "shape", "a text must be a string, not null"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " \n"}], "empty answer", "message 2"),
        ([{"role": "user", "content": "a"}], "no answer", "no message of the assistant's"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "tools", "message 1 calls tools"),
        ({"image": "https://x.org/a.jpg", "text": "a"}, "picture", "is an address, and nothing is downloaded"),
        ({"image": "data:image/png;base64,???", "text": "a"}, "picture", "is not a picture in base64"),
        ({"image": 5, "text": "a"}, "picture", "bytes, not a number"),
        ({"image": {"bytes": None, "path": None}, "text": "a"}, "picture", "bytes, not null"),
        ({"text": "a"}, "shape", "a text without a picture needs a question; give the source a prompt"),
        ({"question": ["a"], "answer": "b"}, "shape", "question: a text must be a string, not a list"),
        ({"texts": [{"user": "a"}]}, "shape", 'turn 1 has no "assistant"'),
        (
            {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image><image>"}, SAID]},
            "picture", "have 2 places for pictures, and the row has 1",
        ),
        ({"conversations": [{"from": "human", "value": "<image>"}, SAID]}, "picture", "and the row has 0"),
        ({"images": ["a"], "messages": [asking({"type": "image", "index": 4}), SAID]}, "picture", "1 places"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(row: Any, kind: str, message: str) -> None:
    assert problem(row)[0] == kind
    assert message in problem(row)[1]
