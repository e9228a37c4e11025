"""Tokenizers from a GGUF file's metadata: the ids of the tokenizer that the metadata was made from."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from llama_multimodal.errors import CheckpointError
from llama_multimodal.processing.gguf_tokenizer import tokenizer_from_gguf
from llama_multimodal.processing.tokenizer import BYTE_TO_CHAR, PATTERN, Tokenizer

WORDS = (
    "Hello", "world", "don't", "I'LL", "we've", "x", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "12", "3456", "1", "²",
    "½", "٣", "é", "naïve", "日本語", "中文", "한국어", "😀", "👩‍👩‍👧", "...", "!?", "--", "==", "$5", "a_b", "(x)",
    " ", "\u00a0", "\u3000", "Ünïcode", "e\u0301", "def f(x):", "    return", "ﬁ", "\u200b", "~", "`", "^", "|", "+",
    "0.5", "1,000", "'s", "'S", "’s", "<|im_start|>", "<s", "<think>",
)  # fmt: skip
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>")


def texts(count: int = 200) -> list[str]:
    """Varied, with spaces of every kind between the words, the same on every run."""
    rng = random.Random(0)
    made = ["", "a", " a", "  a", "a ", "a  ", " "]
    while len(made) < count:
        words = rng.choices(WORDS, k=rng.randint(1, 12))
        made.append("".join(word + rng.choice(("", " ", " ", "  ")) for word in words))
    return made


def metadata_of(backend: tokenizers.Tokenizer, model: str, **more: Any) -> dict[str, Any]:
    """As llama.cpp's converter writes it."""
    saved = json.loads(backend.to_str())
    vocabulary = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    added = backend.get_added_tokens_decoder()
    types = [1 if i not in added else 3 if added[i].special else 4 for _, i in vocabulary]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in saved["model"]["merges"]]
    table = {
        "model": model,
        "tokens": [token for token, _ in vocabulary],
        "token_type": types,
        "merges": merges,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in table.items()}


def trained(pre: pre_tokenizers.PreTokenizer, ignore_merges: bool = False) -> tokenizers.Tokenizer:
    """A byte-level tokenizer of some hundred tokens, with control tokens and one that is only never cut."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=list(SPECIAL), initial_alphabet=list(BYTE_TO_CHAR), show_progress=False
    )
    backend.train_from_iterator([*texts(), Path(__file__).read_text(encoding="utf-8")], trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return backend


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


ORIGINALS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "llama-bpe": lambda: trained(split(PATTERN), ignore_merges=True),
    "smaug-bpe": lambda: trained(split(PATTERN)),
    "smollm": lambda: trained(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ),
    "gpt-2": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
}


@pytest.mark.parametrize("pre", list(ORIGINALS))
def test_byte_level_ids_are_the_originals(pre: str) -> None:
    original = ORIGINALS[pre]()
    found = tokenizer_from_gguf(metadata_of(original, "gpt2", pre=pre))
    assert found is not None and not Tokenizer.from_backend(found.backend).begins_with_space
    ours, theirs = Tokenizer.from_backend(found.backend), Tokenizer.from_backend(original)
    assert ours.special_tokens == theirs.special_tokens == found.special_tokens == {n: i for i, n in enumerate(SPECIAL)}
    assert found.user_tokens == {"<think>": original.token_to_id("<think>")}
    for text in texts():
        ids = theirs.encode(text)
        assert ours.encode(text) == ids and ours.decode(ids) == text
        assert ours.encode_with_special(text) == theirs.encode_with_special(text)


def sentencepiece_metadata(**more: Any) -> dict[str, Any]:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=[*SPECIAL, *byte_tokens], max_token_length=16, show_progress=False
    )
    lines = [*texts(), *Path(__file__).read_text(encoding="utf-8").split("\n")]
    backend.train_from_iterator([re.sub("<think>|[日本語한국😀]", "", text) for text in lines], trainer)
    tokens = [token for token, _ in sorted(backend.get_vocab().items(), key=lambda item: item[1])]
    scores = [0.0 if i < 260 else 260.0 - i for i in range(len(tokens))]
    types = [2, 3, 3, 3, *[6] * 256, *[1] * (len(tokens) - 260), 4]
    table = {"model": "llama", "tokens": [*tokens, "<think>"], "scores": [*scores, 0.0], "token_type": types}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {f"tokenizer.ggml.{key}": value for key, value in {**table, **ids, **more}.items()}


def sentencepiece_ids(metadata: Mapping[str, Any], text: str) -> list[int]:
    """SentencePiece's rule: join the neighbours whose join scores best, the leftmost first, till none is a token."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    types, ids = metadata["tokenizer.ggml.token_type"], {token: i for i, token in enumerate(tokens)}
    pieces = list(text.replace(" ", "▁"))
    while True:
        joins = [(ids.get(a + b), at) for at, (a, b) in enumerate(itertools.pairwise(pieces))]
        scored = [(-scores[i], at) for i, at in joins if i is not None and types[i] in (1, 4)]
        if not scored:
            break
        at = min(scored)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    spelt = [[piece] if piece in ids else [f"<0x{byte:02X}>" for byte in piece.encode()] for piece in pieces]
    return [ids[piece] for written in spelt for piece in written]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_follow_the_scores(prefix: bool) -> None:
    metadata = sentencepiece_metadata(add_space_prefix=prefix)
    found = tokenizer_from_gguf(metadata)
    assert found is not None and found.adds_bos
    assert Tokenizer.from_backend(found.backend).begins_with_space == prefix
    assert found.special_tokens == {name: i for i, name in enumerate(SPECIAL)}
    assert found.named == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    ours, think = Tokenizer.from_backend(found.backend), found.user_tokens["<think>"]
    fallbacks = 0
    for text in texts():
        wanted: list[int] = []
        for n, part in enumerate(text.split("<think>")):
            wanted += [think] if n else []
            wanted += sentencepiece_ids(metadata, " " + part if prefix else part) if part else []
        assert ours.encode(text) == wanted, text
        fallbacks += sum(4 <= i < 260 for i in wanted)
        assert ours.decode(wanted).replace(" ", "") == text.replace(" ", "")
    assert fallbacks > 100
    assert found.special_tokens["<s>"] not in ours.encode("a <s> b<s>")  # though "<s" and ">" are tokens
    assert ours.encode_with_special("<s>")[0] == 1


LLAMA_CPP = """
import json, llama_cpp, sys
texts = json.load(sys.stdin)
for path in sys.argv[1:]:
    model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    cut = lambda special: [model.tokenize(text.encode(), add_bos=False, special=special) for text in texts]
    print(json.dumps([llama_cpp.llama_vocab_get_add_bos(model._model.vocab), cut(False), cut(True)]))
"""


def test_ids_are_those_of_llama_cpp(tmp_path: Path) -> None:
    """In a process of its own, which llama.cpp ends where it dislikes a file."""
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    metadata = {pre: metadata_of(original(), "gpt2", pre=pre) for pre, original in ORIGINALS.items()}
    metadata["default"] = metadata["gpt-2"] | {"tokenizer.ggml.pre": "default"}
    metadata["sentencepiece"] = sentencepiece_metadata()
    paths = [_vocabulary_file(tmp_path / f"{name}.gguf", table) for name, table in metadata.items()]
    command = [sys.executable, "-c", LLAMA_CPP, *map(str, paths)]
    done = subprocess.run(command, input=json.dumps(texts()), capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    for (name, table), (adds_bos, as_text, with_special) in zip(metadata.items(), lines, strict=True):
        found = tokenizer_from_gguf(table)
        assert found is not None and found.adds_bos == adds_bos
        ours = Tokenizer.from_backend(found.backend)
        for text, plain, special in zip(texts(), as_text, with_special, strict=True):
            # Where control tokens are to be text, llama.cpp yet joins the parts of one by the scores; ours does not.
            if name != "sentencepiece" or "<|im_start|>" not in text:
                assert ours.encode(text) == plain, (name, text)
            assert ours.encode_with_special(text) == special, (name, text)


def _vocabulary_file(path: Path, metadata: Mapping[str, Any]) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    sizes = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
    for key in sizes:
        writer.add_uint32(f"llama.{key}", 8)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in metadata.items():
        add: dict[type, Any] = {int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_what_the_file_says_besides() -> None:
    metadata = metadata_of(ORIGINALS["llama-bpe"](), "gpt2", pre="llama-bpe", bos_token_id=1, padding_token_id=99999)
    found = tokenizer_from_gguf({**metadata, "tokenizer.chat_template": "{{ messages }}"})
    assert found is not None and found.chat_template == "{{ messages }}" and found.adds_bos
    assert found.named == {"bos_token": "<s>"}
    silent = tokenizer_from_gguf({**metadata, "tokenizer.ggml.add_bos_token": False})
    assert silent is not None and not silent.adds_bos and silent.chat_template is None
    assert tokenizer_from_gguf({}) is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'; read are default, gpt-2, llama-bpe"),
        ({"tokens": "abc"}, "tokens must be a list of str"),
        ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, "has the token 'a' twice"),
        ({"token_type": [1]}, "types for 1"),
        ({"merges": ["ab"]}, "the damaged merge 'ab'"),
        ({"merges": ["nowhere here"]}, "tokenizer is damaged"),
        ({"model": "llama"}, "scores for 0"),
    ],
)
def test_damaged_metadata(change: Mapping[str, Any], message: str) -> None:
    metadata = metadata_of(ORIGINALS["smollm"](), "gpt2", pre="smollm")
    with pytest.raises(CheckpointError, match=message):
        tokenizer_from_gguf({**metadata, **{f"tokenizer.ggml.{key}": value for key, value in change.items()}})
