"""The shapes that conversations have in files, each recognised by its columns, as the processor's messages."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...config import nearest
from ...processing.images import ImageSource
from ...processing.prompt import ROLES
from .config import SourceConfig
from .skips import BadRow

ROLE_NAMES = {
    **{role: role for role in ROLES}, "human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "developer": "system",
}  # fmt: skip
"""What a speaker is called in files, and the role it is."""

PAIRS = (
    ("question", "answer"), ("prompt", "completion"), ("prompt", "response"), ("query", "response"),
    ("instruction", "output"),
)  # fmt: skip
"""Columns of a question and of its answer."""
TEXTS = ("text", "caption")
PICTURES = ("images", "image", "file_name")
SHAPES = "messages, conversations, texts, " + ", ".join("+".join(pair) for pair in PAIRS) + ", " + ", ".join(TEXTS)

_MARK = re.compile(r"\n?<image>\n?")  # a line break beside it is how files set it apart; a template does so itself
_DATA_URL = re.compile(r"data:[\w/+.-]*;base64,", re.ASCII)


@dataclass(frozen=True)
class Conversation:
    """Messages for the processor, whose pictures are not opened yet, and the name of the shape they were found in."""

    messages: list[dict[str, Any]]
    shape: str


class _Slot:
    """A place of a picture that the row names elsewhere. index: which one; None: the next one."""

    def __init__(self, index: Any = None) -> None:
        self.index = index if isinstance(index, int) else None


def conversation(row: Any, source: SourceConfig, find: Callable[[str], ImageSource]) -> Conversation:
    """A row as messages.

    find: the picture that a path in the row means

    Raises:
        BadRow: the row has none of the known shapes, or something in it is missing or of the wrong kind.
    """
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise BadRow("shape", f"a row must be a table of columns, not {_kind(row)}")
    row = {key: value for key, value in _renamed(row, source.columns).items() if value is not None}
    given: Any = next((row[key] for key in PICTURES if key in row), [])
    listed = given if isinstance(given, list | tuple) else [given]
    pictures = [picture(one, find) for one in listed if one is not None]
    messages, shape = _messages(row, source, marked=bool(pictures), find=find)
    _place(messages, pictures)
    system = row.get("system") or source.system
    if system and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": [_text(system, "system")]})
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant" and not any(part.get("text", "").strip() for part in message["content"]):
            raise BadRow("empty answer", f"message {number} of the assistant's says nothing")
    if all(message["role"] != "assistant" or not message["learn"] for message in messages):
        raise BadRow("no answer", "there is no message of the assistant's to learn")
    return Conversation(messages, shape)


def picture(value: Any, find: Callable[[str], ImageSource]) -> ImageSource:
    """What the processor opens, from a path, a data: URL, bytes, or a table of bytes, path or url.

    Raises:
        BadRow: it is none of them, or an address.
    """
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key)), None)
    if not isinstance(value, str):
        if value is None or isinstance(value, bool | int | float | list | tuple | Mapping):
            raise BadRow("picture", f"a picture must be a path, a data: URL or bytes, not {_kind(value)}")
        return value
    if value.startswith("data:"):
        head = _DATA_URL.match(value)
        try:
            return base64.b64decode(value[head.end() :] if head else "!", validate=True)
        except binascii.Error:
            raise BadRow("picture", f"{value[:40]}… is not a picture in base64") from None
    if re.match(r"\w+://", value):
        raise BadRow("picture", f"{value[:200]} is an address, and nothing is downloaded; save it as a file")
    return find(value)


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    taken = {}
    for ours, theirs in columns.items():
        if theirs not in row:
            raise BadRow("shape", f'there is no column "{theirs}"{nearest(theirs, map(str, row))}')
        taken[ours] = row[theirs]
    return {**{key: value for key, value in row.items() if key not in columns.values()}, **taken}


def _messages(
    row: Mapping[str, Any], source: SourceConfig, marked: bool, find: Callable[[str], ImageSource]
) -> tuple[list[dict[str, Any]], str]:
    """The messages, with slots for pictures, and the shape's name. marked: whether `<image>` in a text is a mark"""
    for key in ("messages", "conversations", "conversation"):
        if key in row:
            return _listed(row[key], key, marked, find), key
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        asked = _listed(row["prompt"], "prompt", marked, find)
        known = [{**message, "learn": False} for message in asked]
        return known + _listed(row["completion"], "completion", marked, find), "prompt+completion"
    if isinstance(row.get("texts"), list):
        return _turns(row["texts"], marked), "texts"
    for question, answer in PAIRS:
        if question in row and answer in row:
            asked = [_text(row[question], question), *([_text(row["input"], "input")] if row.get("input") else [])]
            said = {"user": "\n".join(part["text"] for part in asked), "assistant": row[answer]}
            return _turns([said], marked), f"{question}+{answer}"
    for key in TEXTS:
        if key in row:
            if not marked and source.prompt is None:
                raise BadRow("shape", f"a {key} without a picture needs a question; give the source a prompt")
            return _turns([{"user": source.prompt or "", "assistant": row[key]}], marked), key
    columns = ", ".join(map(str, row)) or "none"
    raise BadRow("shape", f"no known shape: the columns are {columns[:200]}; known: {SHAPES}")


def _turns(turns: Sequence[Any], marked: bool) -> list[dict[str, Any]]:
    """Questions and answers, from tables of user and assistant."""
    messages = []
    for number, turn in enumerate(turns, 1):
        for role in ("user", "assistant"):
            if not isinstance(turn, Mapping) or turn.get(role) is None:
                raise BadRow("shape", f'turn {number} has no "{role}"')
            content = _content(turn[role], f"turn {number}", marked, _no_pictures)
            messages.append({"role": role, "content": content, "learn": True})
    return messages


def _listed(listed: Any, where: str, marked: bool, find: Callable[[str], ImageSource]) -> list[dict[str, Any]]:
    if not isinstance(listed, list | tuple) or not listed:
        raise BadRow("shape", f"{where} must be a list of messages, not {_kind(listed) if listed else 'an empty one'}")
    return [_message(message, f"message {number}", marked, find) for number, message in enumerate(listed, 1)]


def _message(message: Any, where: str, marked: bool, find: Callable[[str], ImageSource]) -> dict[str, Any]:
    """From {"role", "content"} or {"from", "value"}."""
    if not isinstance(message, Mapping):
        raise BadRow("shape", f"{where} must be a table, not {_kind(message)}")
    named = message.get("role", message.get("from"))
    role = ROLE_NAMES.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        if named is None:
            raise BadRow("role", f'{where} has no "role"')
        known = f"{nearest(str(named), ROLE_NAMES)}; known: {', '.join(ROLE_NAMES)}"
        raise BadRow("role", f'{where} has an unknown role "{str(named)[:40]}"{known}')
    if message.get("tool_calls") or message.get("function_call"):
        raise BadRow("tools", f"{where} calls tools, which is not supported")
    content = message.get("content", message.get("value"))
    if content is None:
        raise BadRow("shape", f'{where} has no "content"')
    # OpenAI's files switch an answer off with a weight of 0, others with "train": false.
    learn = message.get("weight") != 0 and message.get("train") is not False and message.get("learn") is not False
    written = marked or ("from" in message and role != "assistant")  # LLaVA's: a mark always means a picture
    return {"role": role, "content": _content(content, where, written, find), "learn": learn}


def _content(content: Any, where: str, marked: bool, find: Callable[[str], ImageSource]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        content = [content]
    if not isinstance(content, list | tuple):
        raise BadRow("shape", f"{where}: content must be a text or a list of parts, not {_kind(content)}")
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise BadRow("shape", f"{where}: a part must be a table or a text, not {_kind(part)}")
        kind = str(part.get("type", "")).removeprefix("input_").removeprefix("output_")
        if kind == "text":
            parts += _split(_text(part.get("text"), where)["text"], marked)
        elif kind in ("image", "image_url"):
            own = next((part[key] for key in ("image", "image_url", "url", "path") if part.get(key) is not None), None)
            parts.append({"type": "image", "image": _Slot(part.get("index")) if own is None else picture(own, find)})
        else:
            known = f"{nearest(kind, ('text', 'image', 'image_url'))}; known: text, image, image_url"
            raise BadRow("shape", f'{where}: unknown type of content "{str(part.get("type"))[:40]}"{known}')
    return parts


def _split(text: str, marked: bool) -> list[dict[str, Any]]:
    """A text as parts, with a slot for each `<image>` where that is a mark."""
    pieces = _MARK.split(text) if marked else [text]
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image", "image": _Slot()})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _place(messages: Sequence[dict[str, Any]], pictures: Sequence[ImageSource]) -> None:
    """Fill the slots with the row's pictures; without any slot, all pictures go before the user's first words."""
    slots = [part for message in messages for part in message["content"] if isinstance(part.get("image"), _Slot)]
    if pictures and not slots:
        asked = next((message for message in messages if message["role"] == "user"), None)
        if asked is None:
            raise BadRow("role", "there are pictures and no message of the user's for them")
        asked["content"][:0] = [{"type": "image", "image": one} for one in pictures]
        return
    indices = [number if part["image"].index is None else part["image"].index for number, part in enumerate(slots)]
    if sorted(set(indices)) != list(range(len(pictures))):
        counts = f"the texts have {len(slots)} places for pictures, and the row has {len(pictures)}"
        raise BadRow("picture", f"{counts}; there must be a picture for each place")
    for part, index in zip(slots, indices):
        part["image"] = pictures[index]


def _text(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, str):
        raise BadRow("shape", f"{where}: a text must be a string, not {_kind(value)}")
    return {"type": "text", "text": value}


def _no_pictures(name: str) -> ImageSource:
    raise BadRow("picture", f"{name[:200]}: a picture belongs into a column of its own here")


def _kind(value: Any) -> str:
    """What a value is, in words for people who know files rather than Python."""
    names = {dict: "a table", list: "a list", tuple: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
