"""Prompts against Meta's reference: token ids of conversations, and which images each token sees.

Tiles are in tests/processing/test_tiles.py, bit for bit. Text is tokenised here by a table of the texts that the
reference tokenised, so that no vocabulary is needed.
"""

from __future__ import annotations

from typing import Any

import pytest

from llama_multimodal.inputs import visible_images
from llama_multimodal.processing.prompt import Prompt, encode_completion, encode_dialog

IMAGE = 128256  # what the reference feeds the model for <|image|>


class Table:
    """A tokenizer that knows the texts of the golden file and nothing else."""

    def __init__(self, chat: dict[str, Any]) -> None:
        self._special, self._pieces = chat["special"], chat["pieces"]

    def special(self, name: str) -> int:
        return IMAGE if name == "<|image|>" else self._special[name]

    def encode(self, text: str) -> list[int]:
        return self._pieces[text]


def with_images(content: Any) -> Any:
    """The image parts of a golden file carry no picture; give each one a name."""
    if isinstance(content, str):
        return content
    names = (f"picture {i}" for i in range(len(content)))
    return [{**part, "image": next(names)} if part["type"] == "image" else part for part in content]


def check(prompt: Prompt, expected: dict[str, Any]) -> None:
    assert prompt.tokens == expected["ids"]
    assert len(prompt.images) == prompt.tokens.count(IMAGE) == len(expected["mask"])
    assert visible_images(prompt.tokens, IMAGE) == ranges(expected["mask"], len(prompt.tokens))


def ranges(mask: list[list[int]], length: int) -> list[tuple[int, int]]:
    """The reference's spans of text for each image, as images [first, end) for each token."""
    out = []
    for t in range(length):
        seen = [i for i, (first, end) in enumerate(mask) if first <= t < (length if end == -1 else end)]
        assert seen == list(range(seen[0], seen[-1] + 1)) if seen else True
        out.append((seen[0], seen[-1] + 1) if seen else (0, 0))
    return out


def test_dialogs(chat) -> None:
    assert len(chat["dialogs"]) >= 12
    for name, dialog in chat["dialogs"].items():
        messages = [{**message, "content": with_images(message["content"])} for message in dialog["messages"]]
        try:
            check(encode_dialog(Table(chat), messages, IMAGE), dialog)
        except AssertionError as error:
            raise AssertionError(f"dialog {name!r}") from error


def test_completions(chat) -> None:
    for completion in chat["completions"].values():
        check(encode_completion(Table(chat), with_images(completion["content"]), IMAGE), completion)


def test_special_token_names_in_text_are_text(chat) -> None:
    """A user who writes `<|eot_id|>` does not end their turn, and one who writes `<|image|>` shows no image."""
    dialog = chat["dialogs"]["special tokens in text stay text"]
    prompt = encode_dialog(Table(chat), dialog["messages"], IMAGE)
    assert prompt.tokens.count(chat["special"]["<|eot_id|>"]) == 1
    assert prompt.tokens.count(chat["special"]["<|begin_of_text|>"]) == 1
    assert IMAGE not in prompt.tokens and not prompt.images


def test_the_first_token_only_is_bos(chat) -> None:
    for dialog in chat["dialogs"].values():
        assert dialog["ids"][0] == chat["special"]["<|begin_of_text|>"]
        assert dialog["ids"].count(dialog["ids"][0]) == 1


def test_visible_images_of_any_row(chat) -> None:
    """Every pattern of up to seven tokens, image or not."""
    for pattern, mask in chat["ranges"]:
        row = [IMAGE if letter == "I" else 7 for letter in pattern]
        assert visible_images(row, IMAGE) == ranges(mask, len(row)), pattern


@pytest.mark.parametrize("name", ["two images", "adjacent images", "images in several turns"])
def test_several_images_keep_their_order(chat, name: str) -> None:
    dialog = chat["dialogs"][name]
    messages = [{**message, "content": with_images(message["content"])} for message in dialog["messages"]]
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    given = [part["image"] for part in parts if part["type"] == "image"]
    assert encode_dialog(Table(chat), messages, IMAGE).images == given
