"""A small tokenizer in Meta's rank format, and the same as the converted `tokenizer.json` looks; both synthetic."""

from __future__ import annotations

import base64
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, processors

from llama_multimodal.processing.tokenizer import BYTE_TO_CHAR, llama3_pre_tokenizer

TEXT = (
    "How many red circles are there? There are three red circles, and 12 blue squares; "
    "the user's assistant isn't sure. "
    "system user assistant ipython \n\n\n\n  def f(x):\n\treturn x**2  # ok\n"
    "Schöne Grüße, naïve “quotes” — 你好你好 🦙🦙🏽 "
    "aaaaaaaa aaaa abababab the then there other others another 1234567 3.14159 3.14 I'LL we've "
) * 3


def train_ranks(text: str, size: int) -> dict[bytes, int]:
    """Byte-pair encoding as tiktoken's ranks: 256 bytes, then the most frequent join of neighbours, again and again."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    characters = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}
    counts = Counter(piece for piece, _ in llama3_pre_tokenizer().pre_tokenize_str(text))
    words = [([bytes([characters[char]]) for char in piece], n) for piece, n in counts.items()]
    while len(ranks) < size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, n in words:
            for pair in pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.setdefault(left + right, len(ranks))
        words = [(_join(word, left, right), n) for word, n in words]
    return ranks


def _join(word: list[bytes], left: bytes, right: bytes) -> list[bytes]:
    out: list[bytes] = []
    for part in word:
        if out and out[-1] == left and part == right:
            out[-1] = left + right
        else:
            out.append(part)
    return out


def write_ranks(ranks: dict[bytes, int], path: Path) -> None:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))


def write_json(ranks: dict[bytes, int], path: Path) -> None:
    """With one merge a token, the one that byte-pair encoding itself makes it by; special tokens, and BOS put first."""
    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = [bytes([byte]) for byte in token]
            while len(parts) > 2:  # encode it with the ranks before its own
                joins = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts))]
                _, i = min(joins)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            merges.append(tuple(printable(part) for part in parts))
    vocabulary = {printable(token): rank for token, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = llama3_pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special_names()])
    bos = len(ranks)
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    raw = json.loads(backend.to_str())
    raw["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(raw), encoding="utf-8")


def printable(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def special_names() -> list[str]:
    """The 256 of a converted Llama 3.2 checkpoint, and the image token as the first id past them."""
    first = [
        "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id",
        "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag",
    ]  # fmt: skip
    rest = [f"reserved_special_token_{i}" for i in range(2, 256 - len(first) + 2)]
    return [f"<|{name}|>" for name in (*first, *rest, "image")]
