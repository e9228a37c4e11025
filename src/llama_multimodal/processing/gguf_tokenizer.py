"""The tokenizer in a GGUF file's metadata: BPE over bytes (Llama 3, SmolLM2), or SentencePiece (Llama 2, TinyLlama)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ..errors import CheckpointError
from .tokenizer import PATTERN

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # of `tokenizer.ggml.token_type`

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_PUNCTUATION = r"[\p{P}$+<=>^~|]+"

_PATTERNS: dict[str, tuple[str, ...]] = {
    "default": (_PUNCTUATION, _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "llama-bpe": (PATTERN,),
    "llama-v3": (PATTERN,),
    "llama3": (PATTERN,),
    "smaug-bpe": (PATTERN,),
    "smollm": (_DIGIT, _GPT2),
}
"""`tokenizer.ggml.pre` → patterns that cut a text, each the pieces of the one before."""
_WHOLE_WORDS = {"llama-bpe", "llama-v3", "llama3"}
"""Where a piece that is a token is taken as it is, whatever the merges say."""


@dataclass(frozen=True)
class GGUFTokenizer:
    """What the metadata says of text.

    Attributes:
        backend: gives the ids of the original tokenizer and adds none of its own; control tokens are special in it.
        special_tokens: name → id of the control tokens and of the one for what is unknown; no text should give them.
        user_tokens: name → id of tokens that are text, but are never cut (`<think>`).
        adds_bos: whether the model wants `bos_token_id` before a text.
        named: `bos_token`, `eos_token`, `unk_token` and `pad_token`, those that are stated, as they are written.
        chat_template: Jinja, where there is one.
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, int]
    user_tokens: Mapping[str, int]
    adds_bos: bool
    named: Mapping[str, str]
    chat_template: str | None


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> GGUFTokenizer | None:
    """The tokenizer of a file's metadata (`weights.gguf.GGUFFile.metadata`), None where it has no tokens.

    Raises:
        CheckpointError: a kind that is not read, or damaged tables.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        return None
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f'tokenizer.ggml.model is {kind!r}; read are "gpt2" (BPE) and "llama" (SentencePiece)')
    tokens = _table(metadata, "tokens", str)
    types = _table(metadata, "token_type", int) or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"the file has {len(tokens)} tokens and types for {len(types)}; download it again")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        again = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise CheckpointError(f"the file has the token {again!r} twice; convert the model again")
    add_space = kind == "llama" and bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2":
        backend = _byte_level(metadata, vocabulary, pre)
    else:
        backend = _sentencepiece(metadata, vocabulary, types, add_space)
    special = {token: i for i, token in enumerate(tokens) if types[i] in (_CONTROL, _UNKNOWN)}
    users = {token: i for i, token in enumerate(tokens) if types[i] == _USER_DEFINED}
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in users])
    template = metadata.get("tokenizer.chat_template")
    return GGUFTokenizer(
        backend=backend,
        special_tokens=special,
        user_tokens=users,
        adds_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in _WHOLE_WORDS)),
        named=_named(metadata, tokens),
        chat_template=template if isinstance(template, str) else None,
    )


def _byte_level(metadata: Mapping[str, Any], vocabulary: dict[str, int], pre: Any) -> tokenizers.Tokenizer:
    if pre not in _PATTERNS:
        raise CheckpointError(f"tokenizer.ggml.pre is {pre!r}; read are {', '.join(_PATTERNS)}")
    merges = [_pair(merge) for merge in _table(metadata, "merges", str)]
    backend = _bpe(vocabulary, merges, ignore_merges=pre in _WHOLE_WORDS)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _PATTERNS[pre]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    metadata: Mapping[str, Any], vocabulary: dict[str, int], types: Sequence[int], add_space: bool
) -> tokenizers.Tokenizer:
    scores = _table(metadata, "scores", float)
    if len(scores) != len(vocabulary):
        raise CheckpointError(f"the file has {len(vocabulary)} tokens and scores for {len(scores)}; download it again")
    unknown = next((token for token, i in vocabulary.items() if types[i] == _UNKNOWN), None)
    joined = {token for token, i in vocabulary.items() if types[i] in (_NORMAL, _USER_DEFINED)}
    merges = _merges_by_score(vocabulary, scores, joined)
    backend = _bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    steps: list[Any] = [normalizers.Prepend("▁")] if add_space else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if add_space else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"the file's tokenizer is damaged: {error}; download it again") from error


def _merges_by_score(vocabulary: Mapping[str, int], scores: Sequence[float], joined: set[str]) -> list[tuple[str, str]]:
    """Every pair of tokens whose join is a token, the join of the highest score first.

    SentencePiece has no list of merges: it joins the neighbours whose join scores best. Pairs of equal score stand in
    the order that the converters of Hugging Face's files give them: shorter parts last, then by the parts' ids.
    """
    found = []
    for token in joined:
        score = scores[vocabulary[token]]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in joined and right in joined:
                order = (-score, -len(left), -len(right), vocabulary[token], vocabulary[left], vocabulary[right])
                found.append((order, left, right))
    return [(left, right) for _, left, right in sorted(found)]


def _pair(merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise CheckpointError(f"the file's tokenizer has the damaged merge {merge!r}; download it again")
    return left, right


def _table(metadata: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{name}", [])
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise CheckpointError(f"tokenizer.ggml.{name} must be a list of {kind.__name__}; download the file again")
    return values


def _named(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: tokens[i] for name, i in ids.items() if type(i) is int and 0 <= i < len(tokens)}
