"""The chat format against Meta's: `golden/chat_format.json` holds whole dialogs and the ids of each text in them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from llama_multimodal.errors import PromptError
from llama_multimodal.inputs import visible_images
from llama_multimodal.processing.prompt import ROLES, encode_completion, encode_dialog

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "chat_format.json").read_text(encoding="utf-8"))
IMAGE = 128256


class Pieces:
    """The ids of the texts that the reference tokenised; another text (two parts joined, say) is a KeyError."""

    def encode(self, text: str) -> list[int]:
        return GOLDEN["pieces"][text]

    def special(self, name: str) -> int:
        return GOLDEN["special"][name]


TOKENIZER: Any = Pieces()


def numbered(content: Any) -> tuple[Any, list[str]]:
    """The content with a name as each image."""
    content, names = copy.deepcopy(content), []
    for part in content if isinstance(content, list) else []:
        if part["type"] == "image":
            part["image"] = f"picture {len(names)}"
            names.append(part["image"])
    return content, names


def seen_by(ranges: list[tuple[int, int]], image: int) -> list[int]:
    return [t for t, (first, end) in enumerate(ranges) if first <= image < end]


@pytest.mark.parametrize("name", GOLDEN["dialogs"])
def test_dialog(name: str) -> None:
    golden = GOLDEN["dialogs"][name]
    messages, names = [], []
    for message in golden["messages"]:
        content, more = numbered(message["content"])
        messages.append({"role": message["role"], "content": content})
        names += more
    prompt = encode_dialog(TOKENIZER, messages, IMAGE)
    assert prompt.tokens == golden["ids"]
    assert prompt.images == names
    assert prompt.tokens.count(GOLDEN["special"]["<|begin_of_text|>"]) == 1
    ranges = visible_images(prompt.tokens, IMAGE)
    for image, (first, end) in enumerate(golden["mask"]):
        end = len(prompt.tokens) if end == -1 else end
        assert seen_by(ranges, image) == list(range(first, end))
    without = encode_dialog(TOKENIZER, messages, IMAGE, answer=False).tokens
    assert golden["ids"][: len(without)] == without and len(golden["ids"]) - len(without) == 4


@pytest.mark.parametrize("name", GOLDEN["completions"])
def test_completion(name: str) -> None:
    golden = GOLDEN["completions"][name]
    content, names = numbered(golden["content"])
    prompt = encode_completion(TOKENIZER, content, IMAGE)
    assert (prompt.tokens, prompt.images) == (golden["ids"], names)


def test_other_ways_to_write_content() -> None:
    plain = encode_dialog(TOKENIZER, [{"role": "user", "content": "Hello, world!"}], IMAGE)
    for content in (
        ["Hello, world!"],
        [{"type": "text", "text": "Hello, world!"}],
        ({"type": "text", "text": "Hello, world!"},),
    ):
        assert encode_dialog(TOKENIZER, [{"role": "user", "content": content}], IMAGE) == plain
    assert ROLES["tool"] == ROLES["ipython"] == "ipython"


USER = {"role": "user", "content": "Hello, world!"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "empty"),
        ("Hello, world!", "a conversation is a list of messages"),
        (USER, "a conversation is a list of messages"),
        ([USER, "Hello, world!"], "message 2 must be a dict"),
        ([{"content": "x"}], 'message 1 has no "role"'),
        ([{"role": "user"}], 'message 1 has no "content"'),
        ([{**USER, "role": "asistant"}], 'unknown role "asistant"; did you mean "assistant"'),
        ([{**USER, "role": "<|eot_id|>"}], "unknown role"),
        ([{**USER, "role": ["user"]}], "unknown role"),
        ([{**USER, "content": None}], "must be a text or a list of parts"),
        ([{**USER, "content": {"type": "text", "text": "x"}}], "must be a text or a list of parts"),
        ([{**USER, "content": [{"type": "imag", "image": 1}]}], 'type of content "imag"; did you mean "image"'),
        ([{**USER, "content": [{"type": "video"}]}], 'type of content "video"; known: text, image'),
        ([{**USER, "content": [{"text": "x"}]}], 'type of content "None"'),
        ([{**USER, "content": [3]}], "type of content int"),
        ([{**USER, "content": [{"type": "image"}]}], 'has no "image"'),
        ([{**USER, "content": [{"type": "text"}]}], 'has no "text"'),
        ([{**USER, "content": [{"type": "text", "text": 5}]}], "text must be a string"),
    ],
)
def test_malformed(messages: Any, message: str) -> None:
    with pytest.raises(PromptError) as caught:
        encode_dialog(TOKENIZER, messages, IMAGE)
    assert message in str(caught.value) and "\n" not in str(caught.value)
