"""Chat templates: how a checkpoint writes a conversation, in the Jinja that Hugging Face's files hold.

A text of the user's stays text: where it contains the name of a special token, that name is spelt, not obeyed.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, PromptError
from .tokenizer import Tokenizer

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_OPEN, _CLOSE = "\ue000", "\ue001"  # private characters around a name that was in a text
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """A template, and the names of the special tokens it may use."""

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        """tokens: `bos_token`, `eos_token`, … as they are written.

        Raises:
            CheckpointError: it is not valid Jinja.
        """
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        extensions = [loopcontrols, _generation_blocks()]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
        self.source, self.tokens = source, dict(tokens or {})
        # A template that knows of images wants content as a list of parts; any other wants one text.
        self.takes_parts = "image" in source
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"the chat template is not valid: {error}; download the checkpoint again") from error

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
        from jinja2 import TemplateError

        try:
            return self._template.render(messages=messages, add_generation_prompt=answer, **self.tokens)
        except TemplateError as error:
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
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        special = re.compile("|".join(map(re.escape, names))) if names else None

        def mark(part: Mapping[str, Any]) -> Mapping[str, Any]:
            if part["type"] != "text":
                return {"type": "image"}
            text = part["text"].replace(_OPEN, "").replace(_CLOSE, "")
            if special is not None:
                text = special.sub(lambda match: f"{_OPEN}{match.group()}{_CLOSE}", text)
            return {"type": "text", "text": text}

        marked = []
        for message in messages:
            text = message["content"]
            parts = [mark(part) for part in ([{"type": "text", "text": text}] if isinstance(text, str) else text)]
            content: Any = parts if self.takes_parts else "".join(part.get("text", image_token) for part in parts)
            marked.append({**message, "content": content})
        ids = []
        for number, piece in enumerate(re.split(f"{_OPEN}(.*?){_CLOSE}", self.render(marked, answer=answer))):
            ids += tokenizer.encode(piece) if number % 2 else tokenizer.encode_with_special(piece)
        return ids


def _generation_blocks() -> type[Any]:
    """`{% generation %}`…`{% endgeneration %}`, which LLaVA's templates put around what the assistant says. It tells
    training which tokens to learn, and writes nothing."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationBlocks(Extension):
        tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

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
