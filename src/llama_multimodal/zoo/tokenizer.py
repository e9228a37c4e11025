"""The embedded model's tokenizer: whole words that its texts use often, and bytes for everything else.

It is a `tokenizer.json` like any other. There are no merges: a pre-token is either in the vocabulary as a whole, or
spelt byte by byte. So what is printed in a picture is always spelt in the same letters, and a count is written in
digits, while "Ġcircle" is one token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import tokenizers
from tokenizers import AddedToken, decoders, models

from ..processing.tokenizer import BYTE_TO_CHAR, llama3_pre_tokenizer

SPECIAL_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip
IMAGE_TOKEN = "<|image|>"
MAX_VOCABULARY = 1024  # without `<|image|>`
_ALWAYS = ("user", "assistant", "system", "\n\n")  # every prompt's headers are written with these


def build_tokenizer(texts: Iterable[str], max_words: int) -> tokenizers.Tokenizer:
    """A tokenizer for `texts`: 256 bytes, at most `max_words` whole pre-tokens, the special tokens.

    `<|image|>` comes last: its id is the vocabulary's size, the first embedding row past the language-model head.
    The same texts, in any order, give the same tokenizer.

    Raises:
        ValueError: `max_words` does not leave room for the header words, or makes more than 1024 tokens.
    """
    most = MAX_VOCABULARY - 256 - len(SPECIAL_TOKENS)
    if not len(_ALWAYS) <= max_words <= most:
        raise ValueError(f"max_words must be from {len(_ALWAYS)} to {most}, not {max_words}")
    split = llama3_pre_tokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(piece for piece, _ in split.pre_tokenize_str(text))
    characters = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}
    always = ["".join(BYTE_TO_CHAR[byte] for byte in word.encode()) for word in _ALWAYS]
    wanted = {
        piece: count
        for piece, count in counts.items()
        if piece not in always and _deserves_a_token(bytes(characters[char] for char in piece))
    }
    frequent = sorted(wanted, key=lambda piece: (-wanted[piece], piece))[: max_words - len(always)]
    vocabulary = {piece: i for i, piece in enumerate([*BYTE_TO_CHAR, *always, *frequent])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL_TOKENS])
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)])
    return tokenizer


def _deserves_a_token(piece: bytes) -> bool:
    """A word after a space, a capitalised word, or punctuation of several bytes; never a bare word or a number."""
    text = piece.decode("utf-8", "replace")
    if len(piece) < 2 or "\ufffd" in text or any(char.isnumeric() for char in text):
        return False
    word = text[1:] if text[0] == " " else text
    if word.isalpha():
        return text[0] == " " or (word[0].isupper() and word[1:].islower())
    return not any(char.isalpha() for char in text)
