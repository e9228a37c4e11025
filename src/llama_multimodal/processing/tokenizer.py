"""Text to token ids and back, from `tokenizer.json` or from Meta's `tokenizer.model`; both give the same ids.

Special tokens are kept apart from the text: no text, whatever it contains, encodes to one of them.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from ..errors import CheckpointError, PromptError

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's pre-tokens."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")

IMAGE_TOKEN = "<|image|>"

_SPECIAL_NAMES = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>",
)  # fmt: skip
"""What follows the ranks of Meta's file. Then comes `<|image|>`, whose place there is never used (the model's id for it
is the first one past all 256), and reserved tokens up to 256."""
_NUM_SPECIAL = 256

# Meta cuts its text so that tiktoken does not overflow; a cut changes the ids, so it is made here too.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000
_LONG_RUN = re.compile(rf"\s{{{_MAX_RUN + 1}}}|\S{{{_MAX_RUN + 1}}}")
_RUN_PIECES = re.compile(rf"\s{{1,{_MAX_RUN}}}|\S{{1,{_MAX_RUN}}}")


def _byte_to_char() -> tuple[str, ...]:
    """GPT-2's printable stand-in for each byte: itself where it prints, else a character from 256 on."""
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in prints]
    return tuple(chr(byte) if byte in prints else chr(256 + rest.index(byte)) for byte in range(256))


BYTE_TO_CHAR = _byte_to_char()
_CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}


def llama3_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Split by `PATTERN`, then write bytes as printable characters."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


class Tokenizer:
    """BPE over bytes (Llama 3, SmolLM2), or over characters with bytes for what is rare (Llama 2, TinyLlama, Vicuna).

    Build it with `load`, `from_json` or `from_ranks`.

    Attributes:
        special_tokens: the id of each special token by name (`<|eot_id|>`, …); `<|image|>` as the model knows it.
        begins_with_space: whether the first word of a text is written with the space before it (Llama 2's kind).
        vocab_size: the ids a language-model head can give: all of them but `<|image|>`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, int]) -> None:
        """`backend` is taken over: from now on it matches no special token in a text, cuts nothing and pads nothing."""
        self.special_tokens = dict(special_tokens)
        self._backend = backend
        backend.encode_special_tokens = True  # "encode their names as text"
        backend.no_truncation()
        backend.no_padding()
        kinds = _kinds_of(backend)
        self.begins_with_space = not kinds.isdisjoint(("Strip", "Metaspace"))
        self._names = {i: name for name, i in self.special_tokens.items()}
        added = {i: token.content.encode() for i, token in backend.get_added_tokens_decoder().items()}
        spelt = _byte_level_bytes if "ByteLevel" in kinds else _character_bytes
        try:
            self._bytes = {
                i: added[i] if i in added else spelt(token)
                for token, i in backend.get_vocab().items()
                if i not in self._names
            }
        except KeyError as error:
            raise CheckpointError(f"the tokenizer is not byte-level BPE: its vocabulary contains {error}") from None
        ids = {*self._bytes, *(i for i, name in self._names.items() if name != IMAGE_TOKEN)}
        self.vocab_size = max(ids, default=-1) + 1

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[tokenizers.Tokenizer, dict[str, int]]]:
        return Tokenizer, (self._backend, self.special_tokens)  # a backend forgets on the way what it was set to

    # --- reading files ---

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer | None:
        """The tokenizer of a checkpoint folder: `tokenizer.json`, else `tokenizer.model`, else None.

        Raises:
            CheckpointError: the file is damaged or of another kind.
        """
        folder = Path(folder)
        for name, read in zip(TOKENIZER_FILES, (cls.from_json, cls.from_ranks)):
            if (folder / name).is_file():
                return read(folder / name)
        return None

    @classmethod
    def from_json(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`.

        Raises:
            CheckpointError: it cannot be read, or is not byte-level BPE.
        """
        try:
            return cls._take_over(tokenizers.Tokenizer.from_str(Path(path).read_text(encoding="utf-8")))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer.json: {error}; download it again") from error

    @classmethod
    def from_backend(cls, backend: tokenizers.Tokenizer) -> Tokenizer:
        """From a tokenizer of the `tokenizers` library, which is left as it is."""
        return cls._take_over(tokenizers.Tokenizer.from_str(backend.to_str()))

    @classmethod
    def _take_over(cls, backend: tokenizers.Tokenizer) -> Tokenizer:
        if not _kinds_of(backend) & {"ByteLevel", "ByteFallback"}:
            raise CheckpointError(
                "the tokenizer is not BPE over bytes, or with bytes for what is rare; no other is read"
            )
        added = backend.get_added_tokens_decoder()
        return cls(backend, {token.content: i for i, token in added.items() if token.special})

    @classmethod
    def from_ranks(cls, path: str | Path) -> Tokenizer:
        """Read Meta's `tokenizer.model`: a line for each token, its bytes in base64 and its rank.

        Raises:
            CheckpointError: a line is malformed, a rank is missing or given twice, or a single byte has no token.
        """
        ranks = _read_ranks(Path(path))
        texts = {token: "".join(map(BYTE_TO_CHAR.__getitem__, token)) for token in ranks}
        vocabulary = {texts[token]: rank for token, rank in ranks.items()}
        merges = [(texts[left], texts[right]) for left, right in _merges(ranks)]
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
        backend.pre_tokenizer = llama3_pre_tokenizer()
        backend.decoder = decoders.ByteLevel()
        reserved = (f"<|reserved_special_token_{i}|>" for i in range(2, _NUM_SPECIAL))
        names = [*_SPECIAL_NAMES, "<|unused_image|>", *reserved][:_NUM_SPECIAL]
        special = {name: len(ranks) + i for i, name in enumerate([*names, IMAGE_TOKEN])}
        return cls(backend, special)

    def with_special(self, name: str) -> tuple[Tokenizer, int]:
        """This tokenizer with one more special token, and the token's id: the next one that is free."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)])
        token = backend.token_to_id(name)
        assert token is not None
        return Tokenizer(backend, {**self.special_tokens, name: token}), token

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json`."""
        self._with_special.save(str(path))

    # --- use ---

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Nothing is added, and the names of special tokens are ordinary text."""
        pieces = _pieces(whole_characters(text))
        return [i for piece in pieces for i in self._backend.encode(piece, add_special_tokens=False).ids]

    def encode_with_special(self, text: str) -> list[int]:
        """Token ids of a text in which the names of special tokens stand for them: a chat template's."""
        return self._with_special.encode(whole_characters(text), add_special_tokens=False).ids

    def encode_with_places(self, text: str, *, special: bool) -> list[tuple[int, int, int]]:
        """(id, start, end) of each token: the characters of `text` that it stands for, or is a part of.

        The ids are those of `encode_with_special`, or of `encode` where `special` is false.
        """
        text = whole_characters(text)
        backend, begin, placed = (self._with_special if special else self._backend), 0, []
        for piece in [text] if special else _pieces(text):
            encoded = backend.encode(piece, add_special_tokens=False)
            placed += [(i, begin + start, begin + end) for i, (start, end) in zip(encoded.ids, encoded.offsets)]
            begin += len(piece)
        return placed

    @functools.cached_property
    def prefix(self) -> list[int]:
        """What the tokenizer's own file has every text begin with, such as BOS. Nothing else here adds it."""
        return self._with_special.encode("", add_special_tokens=True).ids

    @functools.cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._backend.to_str())  # which does not hold `encode_special_tokens`

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8, and ids the tokenizer lacks, come out as U+FFFD."""
        decoder = StreamDecoder(self, skip_special)
        return "".join(map(decoder.push, ids)) + decoder.flush()

    def token_bytes(self, token: int, skip_special: bool = True) -> bytes:
        """What one token writes; it may be a part of a character."""
        token = int(token)
        if token in self._names:
            return b"" if skip_special else self._names[token].encode()
        return self._bytes.get(token, b"\xff")

    def special(self, name: str) -> int:
        """The id of a special token, for example `<|eot_id|>`.

        Raises:
            PromptError: the tokenizer has no such token.
        """
        if name not in self.special_tokens:
            raise PromptError(f"the tokenizer has no special token {name}; is it a Llama 3 tokenizer?")
        return self.special_tokens[name]


class StreamDecoder:
    """Decode tokens one at a time; only whole characters come out.

    `"".join(map(decoder.push, ids)) + decoder.flush()` equals `tokenizer.decode(ids)`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = tokenizer.begins_with_space  # of the first word

    def push(self, token: int) -> str:
        """The characters that this token completes; often one word, sometimes nothing."""
        written = self._tokenizer.token_bytes(token, self._skip_special)
        if self._drops_space and written:
            self._drops_space = False
            written = written.removeprefix(b" ")
        return self._utf8.decode(written)

    def flush(self) -> str:
        """What is left at the end: U+FFFD if a character was begun and not finished."""
        return self._utf8.decode(b"", final=True)


def whole_characters(text: str) -> str:
    """Half a surrogate pair, as broken JSON escapes leave it, becomes U+FFFD (as tiktoken has it)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _pieces(text: str) -> Iterator[str]:
    """Cut as Meta does: every 400,000 characters, and where a run of (non-)spaces reaches 25,000."""
    for start in range(0, len(text), _MAX_CHARS):
        part = text[start : start + _MAX_CHARS]
        if not _LONG_RUN.search(part):
            yield part
            continue
        begin, last = 0, None
        for run in _RUN_PIECES.finditer(part):
            if last is not None and last.group()[0].isspace() == run.group()[0].isspace():  # the run goes on: a cut
                yield part[begin : run.start()]
                begin = run.start()
            last = run
        yield part[begin:]


def _kinds_of(backend: tokenizers.Tokenizer) -> set[str]:
    """The types of a backend's decoders."""
    if backend.decoder is None:
        return set()
    decoder = json.loads(backend.decoder.__getstate__())
    return {one["type"] for one in decoder.get("decoders", [decoder])}


def _byte_level_bytes(token: str) -> bytes:
    return bytes(_CHAR_TO_BYTE[char] for char in token)


def _character_bytes(token: str) -> bytes:
    """What a token of Llama 2's kind writes: `<0x0A>` one byte, `▁` a space."""
    if match := re.fullmatch("<0x([0-9A-F]{2})>", token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode()


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens in the order of their ranks, 0, 1, 2, …"""
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            text, rank = line.split()
            ranks[base64.b64decode(text, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise CheckpointError(
                f"{path}, line {number}: not a token in base64 and its rank; download it again"
            ) from None
    whole = sorted(ranks.values()) == list(range(len(ranks))) and all(bytes([byte]) in ranks for byte in range(256))
    if not whole:
        raise CheckpointError(f"{path}: ranks or single bytes are missing; download it again")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair of tokens whose join is a token, first by the rank of the join.

    Merging by the rank of the join is all that the rank format means; so each way to split a token is a merge.
    """
    for token in ranks:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
