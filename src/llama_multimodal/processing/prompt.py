"""The Llama 3 chat format, as Meta's `chat_format.ChatFormat` encodes it: text as it is given, whitespace and all.

For example `<|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\n<|image|>What is this?<|eot_id|>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import nearest
from ..errors import PromptError
from .tokenizer import Tokenizer

Message = Mapping[str, Any]
"""`{"role": …, "content": text or parts}`.

A part is `{"type": "text", "text": …}` or `{"type": "image", "image": path, bytes, PIL image or array}`.
"""

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython", "ipython": "ipython"}
"""Each role and how it is written in a header."""


@dataclass
class Prompt:
    """Token ids, and the picture for each `<|image|>` among them, not opened yet."""

    tokens: list[int] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)

    def extend(self, other: Prompt) -> None:
        self.tokens += other.tokens
        self.images += other.images


def encode_dialog(
    tokenizer: Tokenizer, messages: Sequence[Message], image_token_id: int | None, *, answer: bool = True
) -> Prompt:
    """A conversation, BOS first; with `answer` it ends in the header of the assistant's next message.

    Raises:
        PromptError: no messages, an unknown role or type of content, or a part without its text or image.
    """
    _check_dialog(messages)
    prompt = Prompt([tokenizer.special("<|begin_of_text|>")])
    for number, message in enumerate(messages, 1):
        prompt.extend(encode_message(tokenizer, message, image_token_id, where=f"message {number}"))
    if answer:
        prompt.tokens += encode_header(tokenizer, "assistant")
    return prompt


def learns(message: Message) -> bool:
    """Whether training is to learn what the message says: the assistant's, unless its "learn" is false."""
    return message["role"] == "assistant" and bool(message.get("learn", True))


def encode_answered(
    tokenizer: Tokenizer, messages: Sequence[Message], image_token_id: int | None
) -> tuple[Prompt, list[bool]]:
    """A whole conversation as `encode_dialog` writes it, and for each token whether training learns it: contents and
    `<|eot_id|>` of the messages that `learns` names.

    Raises:
        PromptError: as `encode_dialog`.
    """
    _check_dialog(messages)
    prompt, learnt = Prompt([tokenizer.special("<|begin_of_text|>")]), [False]
    header = len(encode_header(tokenizer, "assistant"))
    for number, message in enumerate(messages, 1):
        one = encode_message(tokenizer, message, image_token_id, where=f"message {number}")
        learnt += [learns(message) and i >= header for i in range(len(one.tokens))]
        prompt.extend(one)
    return prompt, learnt


def chat_messages(messages: Sequence[Message], *, images: bool) -> tuple[list[dict[str, Any]], list[Any]]:
    """A conversation for a chat template: role and parts of every message; and its pictures in order.

    images: whether the model reads any

    Raises:
        PromptError: not a list of messages, no messages, an unknown role, or a part that is neither text nor image.
    """
    _check_dialog(messages)
    found, pictures = [], []
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        _check_message(message, where)
        parts = _parts(message["content"], where)
        for part in parts:
            if part["type"] == "image":
                if not images:
                    raise PromptError(f"{where} has an image, and this model reads text only")
                pictures.append(part["image"])
        found.append({"role": message["role"], "content": parts})
    return found, pictures


def encode_completion(tokenizer: Tokenizer, content: str | Iterable[Any], image_token_id: int | None) -> Prompt:
    """BOS and content with no chat around it, for a base model to continue."""
    prompt = Prompt([tokenizer.special("<|begin_of_text|>")])
    prompt.extend(encode_content(tokenizer, content, image_token_id, where="the content"))
    return prompt


def encode_message(
    tokenizer: Tokenizer, message: Message, image_token_id: int | None, where: str = "the message"
) -> Prompt:
    """Header, content, `<|eot_id|>`."""
    _check_message(message, where)
    prompt = Prompt(encode_header(tokenizer, ROLES[message["role"]]))
    prompt.extend(encode_content(tokenizer, message["content"], image_token_id, where))
    prompt.tokens.append(tokenizer.special("<|eot_id|>"))
    return prompt


def _check_dialog(messages: Any) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise PromptError('a conversation is a list of messages such as {"role": "user", "content": "Hello"}')
    if not messages:
        raise PromptError("the conversation is empty; it needs at least one message")


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, Mapping):
        raise PromptError(f'{where} must be a dict with "role" and "content", not {type(message).__name__}')
    for key in ("role", "content"):
        if key not in message:
            raise PromptError(f'{where} has no "{key}"')
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        raise PromptError(f'{where} has an unknown role "{role}"{nearest(role, ROLES)}; known: {", ".join(ROLES)}')


def encode_header(tokenizer: Tokenizer, role: str) -> list[int]:
    """Who speaks next; `role` as it is written."""
    begin, end = tokenizer.special("<|start_header_id|>"), tokenizer.special("<|end_header_id|>")
    return [begin, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]


def encode_content(
    tokenizer: Tokenizer, content: str | Iterable[Any], image_token_id: int | None, where: str = "the message"
) -> Prompt:
    """Text or a list of parts. Each text is tokenised by itself, as in the reference: no token spans two parts."""
    prompt = Prompt()
    for part in _parts(content, where):
        if part["type"] == "text":
            prompt.tokens += tokenizer.encode(part["text"])
        elif image_token_id is None:
            raise PromptError(f"{where} has an image, and this model reads text only")
        else:
            prompt.tokens.append(image_token_id)
            prompt.images.append(part["image"])
    return prompt


def _parts(content: Any, where: str) -> list[Mapping[str, Any]]:
    """Content as parts of type text, with a string, or image, with something.

    Raises:
        PromptError: it is anything else.
    """
    if isinstance(content, str):
        content = [content]
    elif isinstance(content, Mapping) or not isinstance(content, Iterable):
        raise PromptError(f"{where}: content must be a text or a list of parts, not {type(content).__name__}")
    parts = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image"):
            stated = f'"{kind}"' if isinstance(part, Mapping) else type(part).__name__
            hint = nearest(str(kind), ("text", "image"))
            raise PromptError(f"{where}: unknown type of content {stated}{hint}; known: text, image")
        if part.get(kind) is None:
            raise PromptError(f'{where}: a part of type "{kind}" has no "{kind}"')
        if kind == "text" and not isinstance(part["text"], str):
            raise PromptError(f"{where}: text must be a string, not {type(part['text']).__name__}")
        parts.append(part)
    return parts
