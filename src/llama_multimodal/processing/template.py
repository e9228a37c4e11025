"""Chat templates: how a checkpoint writes a conversation, in the Jinja that Hugging Face's files hold.

A text of the user's stays text: where it contains the name of a special token, that name is spelt, not obeyed.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, PromptError
from .tokenizer import Tokenizer, whole_characters

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_OPEN, _CLOSE = "\ue000", "\ue001"  # private characters around a name that was in a text
_BEGIN, _END = "\ue002", "\ue003"  # around what a generation block writes
_GENERATION = re.compile(r"{%[-+]?\s*generation\b")
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """A template, and the names of the special tokens it may use."""

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        """tokens: `bos_token`, `eos_token`, … as they are written.

        Raises:
            CheckpointError: it is not valid Jinja.
        """
        self.source, self.tokens = source, dict(tokens or {})
        # A template that knows of images wants content as a list of parts; any other wants one text.
        self.takes_parts = "image" in source
        self._template = _compiled(source)

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[str, dict[str, str]]]:
        return ChatTemplate, (self.source, self.tokens)  # compiled again where it is unpickled

    @classmethod
    def load(cls, folder: str | Path) -> ChatTemplate | None:
        """The template of a checkpoint folder: `chat_template.jinja`, else the one in `chat_template.json` or
        `tokenizer_config.json`, else None.

        Raises:
            CheckpointError: a file is damaged.
        """
        folder = Path(folder)
        tables = {name: _table(folder / name) for name in TEMPLATE_FILES[1:]}
        config = tables["tokenizer_config.json"]
        tokens = {name: _written(config[name]) for name in _NAMED if config.get(name)}
        plain = folder / TEMPLATE_FILES[0]
        found: Any = plain.read_text(encoding="utf-8") if plain.is_file() else None
        for table in tables.values():
            found = found or table.get("chat_template")
        if isinstance(found, list):  # several by name
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, Mapping)}
            found = named.get("default")
        return cls(found, tokens) if isinstance(found, str) else None

    def save(self, folder: str | Path) -> None:
        """Write the template, and the names it may use, as `load` reads them."""
        folder = Path(folder)
        (folder / TEMPLATE_FILES[0]).write_text(self.source, encoding="utf-8")
        if self.tokens:
            text = json.dumps(self.tokens, indent=2, ensure_ascii=False)
            (folder / TEMPLATE_FILES[2]).write_text(text + "\n", encoding="utf-8")

    def render(self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True) -> str:
        """The conversation as one text; with `answer` it ends where the assistant begins.

        Raises:
            PromptError: the template refuses it, and says why.
        """
        return self._render(self._template, messages, answer)

    def _render(self, template: Any, messages: Sequence[Mapping[str, Any]], answer: bool) -> str:
        from jinja2 import TemplateError

        try:
            return template.render(messages=messages, add_generation_prompt=answer, **self.tokens)
        except (TemplateError, TypeError, ValueError, LookupError) as error:  # the last ones, of what it computes
            raise PromptError(f"the model's chat template refuses this conversation: {error}") from error

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        image_token: str | None = None,
        *,
        answer: bool = True,
    ) -> list[int]:
        """Token ids of the conversation. Nothing is added: the template itself writes what comes first.

        messages: content is a text, or parts as in `chat_messages`. image_token: what stands for an image
        """
        text = self.render(self._marked(tokenizer, messages, image_token), answer=answer)
        return [token for token, _, _ in _placed(tokenizer, text)]

    def encode_answered(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        learnt: Sequence[bool],
        image_token: str | None = None,
        end: int | None = None,
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation as `encode` gives them, and for each whether training learns it.

        Learnt is what generation blocks write, else what a message adds to the messages before it and the words that
        ask for it; without white space at its end. A token that it shares with what comes before counts as its own.

        learnt: which messages are, all of them the assistant's
        end: the token that ends a text. Where the template writes none behind the assistant's last words, it is put
            there in place of white space, or the model would never learn to stop.

        Raises:
            PromptError: the template refuses the conversation, or writes its turns differently when more follow.
        """
        marked = self._marked(tokenizer, messages, image_token)
        text = self.render(marked, answer=False)
        spans = [
            (begin, begin + len(text[begin:close].rstrip())) for begin, close in self._answers(text, marked, learnt)
        ]
        placed = _placed(tokenizer, text)
        ids = [token for token, _, _ in placed]
        # A token of no width, as some tokenizers begin a text with, counts as the character after it.
        said = [
            any(start < close and max(stop, start + 1) > begin for begin, close in spans) for _, start, stop in placed
        ]
        last = spans[-1][1] if spans else 0
        ended = text[:last].endswith(tuple(tokenizer.special_tokens))
        if end is not None and spans and not ended and not text[last:].strip():
            keep = sum(start < last for _, start, _ in placed)
            ids, said = [*ids[:keep], end], [*said[:keep], True]
        return ids, said

    def _answers(self, text: str, marked: Sequence[Mapping[str, Any]], learnt: Sequence[bool]) -> list[tuple[int, int]]:
        """Which characters of the rendered text are learnt, as (begin, end)."""
        blocks = self._blocks(text, marked)
        if blocks is not None and all(learn or one["role"] != "assistant" for one, learn in zip(marked, learnt)):
            return blocks
        turns = []
        for j, learn in enumerate(learnt):
            if not learn:
                continue
            before, after = self.render(marked[:j], answer=True), self.render(marked[: j + 1], answer=False)
            if not (after.startswith(before) and text.startswith(after)):
                raise PromptError(
                    f"the model's chat template writes message {j + 1} differently when other messages follow or its"
                    " answer is still to come, so what it says cannot be told apart; give the template"
                    " {% generation %} blocks around the assistant's words"
                )
            turns.append((len(before), len(after)))
        if blocks is None:
            return turns
        return [block for block in blocks if any(begin <= block[0] and block[1] <= end for begin, end in turns)]

    def _blocks(self, text: str, marked: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]] | None:
        """What generation blocks write, as (begin, end) in the rendered text; None for a template that has none."""
        if not _GENERATION.search(self.source):
            return None
        written = self._render(_compiled(self.source, _BEGIN, _END), marked, answer=False)
        pieces = re.split(f"([{_BEGIN}{_END}])", written)
        if "".join(pieces[::2]) != text:
            raise PromptError("the model's chat template changes what its generation blocks write; it cannot be learnt")
        blocks, place = [], 0
        for piece, mark in zip(pieces[::2], [*pieces[1::2], ""]):
            place += len(piece)
            if mark == _BEGIN:
                begin = place
            elif mark == _END:
                blocks.append((begin, place))
        return blocks

    def _marked(
        self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], image_token: str | None
    ) -> list[dict[str, Any]]:
        """The messages as the template takes them, with marks around the names of special tokens in their texts."""
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        special = re.compile("|".join(map(re.escape, names))) if names else None

        def mark(part: Mapping[str, Any]) -> Mapping[str, Any]:
            if part["type"] != "text":
                return {"type": "image"}
            text = re.sub(f"[{_OPEN}{_CLOSE}{_BEGIN}{_END}]", "", whole_characters(part["text"]))
            if special is not None:
                text = special.sub(lambda match: f"{_OPEN}{match.group()}{_CLOSE}", text)
            return {"type": "text", "text": text}

        marked = []
        for message in messages:
            text = message["content"]
            parts = [mark(part) for part in ([{"type": "text", "text": text}] if isinstance(text, str) else text)]
            content: Any = parts if self.takes_parts else "".join(part.get("text", image_token) for part in parts)
            marked.append({**message, "content": content})
        return marked


def _placed(tokenizer: Tokenizer, text: str) -> list[tuple[int, int, int]]:
    """Tokens of a rendered text with their places in it; a name between marks is spelt."""
    placed, begin = [], 0
    for number, piece in enumerate(re.split(f"{_OPEN}(.*?){_CLOSE}", text)):
        found = tokenizer.encode_with_places(piece, special=number % 2 == 0)
        placed += [(token, begin + start, begin + stop) for token, start, stop in found]
        begin += len(piece) + 1
    return placed


@functools.cache
def _compiled(source: str, begin: str = "", end: str = "") -> Any:
    """begin, end: what is written around a generation block.

    Raises:
        CheckpointError: the template is not valid Jinja.
    """
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    extensions = [loopcontrols, _generation_blocks(begin, end)]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise CheckpointError(f"the chat template is not valid: {error}; download the checkpoint again") from error


def _generation_blocks(begin: str, end: str) -> type[Any]:
    """`{% generation %}`…`{% endgeneration %}`, which LLaVA's templates put around what the assistant says. It tells
    training which tokens to learn, and writes nothing but what it is given here."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationBlocks(Extension):
        tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            first, last = (nodes.Output([nodes.TemplateData(mark)]) for mark in (begin, end))
            return nodes.Scope([first, *body, last], lineno=line)

    return GenerationBlocks


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _written(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


def _table(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error
    if not isinstance(table, Mapping):
        raise CheckpointError(f"{path} must hold a table; download it again")
    return table
