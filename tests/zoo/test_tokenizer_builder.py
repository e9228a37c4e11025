from pathlib import Path

import pytest

from llama_multimodal.processing.tokenizer import Tokenizer
from llama_multimodal.zoo.tokenizer import IMAGE_TOKEN, SPECIAL_TOKENS, build_tokenizer

TEXTS = [
    "How many red circles are there?",
    "There are 12 red circles and 345 blue ones — really.",
    'The sign says "HELLO". circle circle\n\nYes.',
] * 2


def test_vocabulary() -> None:
    built = build_tokenizer(TEXTS, 100)
    vocabulary = built.get_vocab()
    for token in ("Ġred", "Ġcircles", "How", "There", "Yes", "user", "assistant", "system", "ĊĊ", "ĠâĢĶ"):
        assert token in vocabulary
    for token in ("circle", "12", "345", "34", "HELLO", "Ġ12", "many"):
        assert token not in vocabulary
    specials = [built.token_to_id(name) for name in SPECIAL_TOKENS]
    size = built.get_vocab_size() - 1
    assert specials == list(range(size - len(specials), size))
    assert built.token_to_id(IMAGE_TOKEN) == size
    tokenizer = Tokenizer.from_backend(built)
    assert tokenizer.vocab_size == size
    assert tokenizer.special("<|eot_id|>") == built.token_to_id("<|eot_id|>")


def test_words_are_whole_and_the_rest_is_bytes() -> None:
    tokenizer = Tokenizer.from_backend(build_tokenizer(TEXTS, 100))

    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([i]) for i in tokenizer.encode(text)]

    assert pieces("There are 12 red") == ["There", " are", " ", "1", "2", " red"]
    assert pieces("redness") == list("redness")
    assert pieces("user\n\n") == ["user", "\n\n"]
    for text in (*TEXTS, "Ünïcode 🦙 \x00 <|eot_id|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_size_is_bounded(tmp_path: Path) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [" ".join(f"{a}{b}{c}" for b in letters for c in letters) for a in "xyz"]
    built = build_tokenizer(texts, 760)
    assert built.get_vocab_size() == 1024 + 1  # and the image
    assert build_tokenizer(texts, 10).get_vocab_size() == 256 + 10 + len(SPECIAL_TOKENS) + 1
    for wrong in (3, 761):
        with pytest.raises(ValueError, match="max_words"):
            build_tokenizer(texts, wrong)
    assert build_tokenizer(reversed(texts), 760).to_str() == built.to_str()
    built.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.from_json(tmp_path / "tokenizer.json")
    assert again.encode(texts[0]) == built.encode(texts[0], add_special_tokens=False).ids
