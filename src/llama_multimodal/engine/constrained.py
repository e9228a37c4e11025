"""Answers that follow a JSON schema, a regular expression or a grammar, by llguidance (extra `constrained`).

Shapes: V ids that the model chooses from
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..errors import MissingExtraError, PromptError
from ..models import LanguageModel

if TYPE_CHECKING:
    from .request import Constraint


class Vocabulary(Protocol):
    """What a tokenizer has for it; `processing.Tokenizer` does."""

    special_tokens: Mapping[str, int]

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, token: int, skip_special: bool = True) -> bytes: ...


class Grammars:
    """Makes constraints for requests, `Request(constraint=grammars.json_schema({…}))`.

    Looking through a vocabulary takes a moment: make one for a model, and keep it.
    """

    def __init__(self, tokenizer: Vocabulary, model: LanguageModel) -> None:
        """Raises:
        MissingExtraError: llguidance is not installed.
        PromptError: the model has no end token, which an answer that is complete needs.
        """
        try:
            import llguidance
        except ImportError as error:
            raise MissingExtraError("constrained", "an answer after a grammar") from error
        text = model.config.text
        if not text.eos_token_ids:
            raise PromptError("this model has no end token, and an answer that is complete ends with one")
        words = _Words(tokenizer, text.vocab_size, text.eos_token_ids)
        wrapped = llguidance.TokenizerWrapper(words)
        self._tokenizer = llguidance.LLTokenizer(wrapped, n_vocab=text.vocab_size, eos_token=list(text.eos_token_ids))
        self._matcher = llguidance.LLMatcher

    def json_schema(self, schema: Mapping[str, Any] | str) -> Callable[[], Constraint]:
        """JSON that a schema describes; `{"type": "object"}` is any object. On one line, with a space behind each comma
        and colon: a model that may write spaces freely may write them for ever.

        Raises:
            PromptError: the schema is not JSON, or says what llguidance does not know.
        """
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema)
            grammar = self._matcher.grammar_from_json_schema(text, defaults={"whitespace_flexible": False})
        except (TypeError, ValueError) as error:
            raise PromptError(f"the JSON schema cannot be read: {error}") from error
        return self._checked(grammar, "JSON schema")

    def regex(self, pattern: str) -> Callable[[], Constraint]:
        """Text that a regular expression matches as a whole.

        Raises:
            PromptError: it is none, or has what Rust's regular expressions have not.
        """
        return self._checked(self._matcher.grammar_from_regex(pattern), "regular expression")

    def lark(self, grammar: str) -> Callable[[], Constraint]:
        """Text of a context-free grammar in Lark's notation, from its rule `start`.

        Raises:
            PromptError: it is none.
        """
        return self._checked(self._matcher.grammar_from_lark(grammar), "grammar")

    def _checked(self, grammar: str, what: str) -> Callable[[], Constraint]:
        failed, problems = self._matcher.validate_grammar_with_warnings(grammar, self._tokenizer)
        if failed:
            raise PromptError(f"the {what} is not valid: {' '.join(' '.join(problems).split())[:300]}")
        return lambda: _Matched(self._matcher(self._tokenizer, grammar, log_level=0))


class _Matched:
    """One answer that follows a grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allow(self, logits: Tensor) -> Tensor:
        """logits [V] with -inf where a token may not come next."""
        mask = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        self._check()
        return logits.masked_fill(mask[: len(logits)].to(logits.device) == 0, float("-inf"))

    def take(self, tokens: Sequence[int]) -> None:
        """The answer goes on with these."""
        self._matcher.consume_tokens(list(tokens))
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise PromptError(f"the grammar cannot be followed: {self._matcher.get_error()[:300]}")


class _Words:
    """A vocabulary as llguidance reads it."""

    def __init__(self, tokenizer: Vocabulary, size: int, eos_token_ids: Collection[int]) -> None:
        self._encode = tokenizer.encode
        self.eos_token_id, self.bos_token_id = next(iter(eos_token_ids)), None
        special = {i for i in tokenizer.special_tokens.values() if i < size}
        self.special_token_ids = sorted(special | set(eos_token_ids))
        names = {i: name for name, i in tokenizer.special_tokens.items()}
        # What begins with 0xff is nobody's text: names of special tokens, and ids that stand for nothing.
        self.tokens = [
            b"\xff" + names.get(i, f"<{i}>").encode()
            if i in self.special_token_ids
            else tokenizer.token_bytes(i) or b"\xff<%d>" % i
            for i in range(size)
        ]

    def __call__(self, text: str | bytes) -> Iterable[int]:
        return self._encode(text.decode(errors="replace") if isinstance(text, bytes) else text)
