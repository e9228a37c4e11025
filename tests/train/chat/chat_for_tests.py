"""Processors of three families on a small tokenizer of whole words, and files of conversations."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llama_multimodal.config import (
    LanguageModelConfig,
    MLPProjector,
    ModelConfig,
    PixelShuffleProjector,
    SiglipConfig,
    TextConfig,
    TiledVisionConfig,
)
from llama_multimodal.processing import Processor, Tokenizer
from llama_multimodal.processing.template import ChatTemplate
from llama_multimodal.train.chat.config import ChatData, chat_data_from_dict
from llama_multimodal.train.chat.steps import ChatSteps
from llama_multimodal.zoo.tokenizer import build_tokenizer

WORDS = "what is this? a cat and dogs. USER: ASSISTANT: User: Assistant: be brief \n\nsystem two"
TILE = 28

# In our own words, what LLaVA's and SmolVLM's templates do: the first has pictures before the text and marks the
# assistant's words, but writes nothing behind them; the second ends every turn with a token and marks nothing.
LLAVA = """{% for message in messages %}{{ message['role'].upper() + ': ' }}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}
{%- if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}
{%- else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
SMOLVLM = """<s>{% for message in messages %}{{ message['role'] | capitalize }}
{%- if message['content'][0]['type'] == 'image' %}:{% else %}{{ ': ' }}{% endif %}
{%- for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}
{%- elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}{{ '<end_of_utterance>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""


@functools.cache
def tokenizer() -> Tokenizer:
    made = Tokenizer.from_backend(build_tokenizer([WORDS] * 3, 40))
    for name in ("<s>", "</s>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>", "<image>"):
        made, _ = made.with_special(name)
    return made


@functools.cache
def meta() -> Processor:
    """Llama 3.2 Vision's format."""
    words = Tokenizer.from_backend(build_tokenizer([WORDS] * 3, 40))
    pad = words.special("<|finetune_right_pad_id|>")
    text = TextConfig(vocab_size=words.vocab_size, max_position_embeddings=200, pad_token_id=pad)
    config = ModelConfig(TiledVisionConfig(image_size=TILE), text, image_token_id=words.vocab_size)
    return Processor(config, words)


def text_config() -> TextConfig:
    return TextConfig(
        vocab_size=tokenizer().vocab_size, cross_attention_layers=(), num_hidden_layers=2, num_extra_embeddings=0,
        eos_token_ids=(tokenizer().special("</s>"),), pad_token_id=tokenizer().special("<|finetune_right_pad_id|>"),
        max_position_embeddings=1000,
    )  # fmt: skip


@functools.cache
def llava(source: str = LLAVA) -> Processor:
    vision = SiglipConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, image_size=28, patch_size=14)
    image = tokenizer().special("<image>")
    config = ModelConfig(vision, text_config(), image, MLPProjector(), "splice", model_type="llava")
    return Processor(config, tokenizer(), ChatTemplate(source, {"eos_token": "</s>"}), config.preprocess())


@functools.cache
def smolvlm() -> Processor:
    vision = SiglipConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, image_size=32, patch_size=8)
    image = tokenizer().special("<image>")
    config = ModelConfig(vision, text_config(), image, PixelShuffleProjector(2), "splice", model_type="smolvlm")
    return Processor(config, tokenizer(), ChatTemplate(SMOLVLM), config.preprocess())


def text_only(source: str) -> Processor:
    return Processor(LanguageModelConfig(text_config()), tokenizer(), ChatTemplate(source, {"eos_token": "</s>"}))


def said(role: str, *parts: str | Image.Image, **more: Any) -> dict[str, Any]:
    """One message of texts and pictures."""
    kinds = ["text" if isinstance(part, str) else "image" for part in parts]
    return {"role": role, "content": [{"type": kind, kind: part} for kind, part in zip(kinds, parts)], **more}


def picture(width: int = 20, height: int = 25, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def asked(question: str = "what is this?", answer: str = "a cat") -> dict[str, Any]:
    return {"question": question, "answer": answer}


def write_lines(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def data_of(*sources: Any, **more: Any) -> ChatData:
    return chat_data_from_dict({"sources": list(sources), **more}, "data")


def steps_of(*sources: Any, rows: int = 4, rank: int = 0, world: int = 1, **more: Any) -> ChatSteps:
    return ChatSteps(data_of(*sources, **more), meta(), rows, rank, world)


def answers(steps: ChatSteps, step: int) -> list[str]:
    """What each example of a step teaches, as text."""
    return [steps.processor.decode(label for label in e.labels if label >= 0) for e in steps[step].examples]
