"""Tiny random LLaVA, LLaVA-NeXT, Idefics3 and SmolVLM as transformers writes them, with what feeds them."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import llama_multimodal as lmm
from llama_multimodal.inputs import ModelInputs
from llama_multimodal.models import VisionLanguageModel
from llama_multimodal.processing.processor import Processor

transformers = pytest.importorskip("transformers")

# --- text ------------------------------------------------------------------------------------------------------------

# In our own words, what the released ones do: LLaVA's has the pictures of a message before its text and marks the
# assistant's words; Idefics3's keeps the order, and looks at the first part of a message.
IMAGES_FIRST = """{% for message in messages %}{{ message['role'].upper() + ': ' }}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}
{%- if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}
{%- else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
IN_ORDER = """{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}
{%- if message['content'][0]['type'] == 'image' %}:{% else %}{{ ': ' }}{% endif %}
{%- for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}
{%- elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}{{ '<end_of_utterance>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

_MARKERS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
_PLACES = ["<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))]


@functools.cache
def tokenizer(places: bool) -> Any:
    """With BOS before every text. places: whether a square's place is one token (SmolVLM 256M) or spelt (Idefics3)."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=names, initial_alphabet=alphabet)
    backend.train_from_iterator(["hello what is this picture user assistant row col \n\n"] * 3, trainer)
    added = [*_MARKERS, *(_PLACES if places else ())]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in added])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", additional_special_tokens=added
    )


# --- models ----------------------------------------------------------------------------------------------------------

_VIT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
CLIP = {
    **_VIT, "model_type": "clip_vision_model", "intermediate_size": 40, "image_size": 28, "patch_size": 7,
    "projection_dim": 16,
}  # fmt: skip
SIGLIP = {**_VIT, "model_type": "siglip_vision_model", "intermediate_size": 40, "image_size": 32, "patch_size": 8}
DINOV2 = {**_VIT, "model_type": "dinov2", "image_size": 28, "patch_size": 7, "mlp_ratio": 2}
REGISTERS = {**DINOV2, "model_type": "dinov2_with_registers", "num_register_tokens": 2}
SQUARES = {key: value for key, value in SIGLIP.items() if key != "model_type"}  # 4 × 4 patches
THREES = {**SQUARES, "image_size": 38, "patch_size": 6}  # 6 × 6 patches, and pixels left over as in 384 / 14

LLAMA3 = {
    "rope_theta": 500000.0, "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.5}
FULL = {"vision_feature_select_strategy": "full"}
WIDE = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
TALL = [[56, 28], [112, 28], [28, 28]]
BIG = [[32, 64], [64, 32], [64, 64], [96, 64]]


@dataclass(frozen=True)
class Kind:
    """family: of transformers' classes. vision, text, more: of the configuration. split: whether pictures are cut into
    squares. places: `tokenizer`'s."""

    family: str
    vision: dict[str, Any]
    text: dict[str, Any]
    more: dict[str, Any]
    split: bool
    places: bool

    @property
    def of_squares(self) -> bool:
        return self.family in ("Idefics3", "SmolVLM")


def _kind(
    family: str,
    vision: dict[str, Any],
    text: dict[str, Any] | None = None,
    *,
    split: bool = True,
    places: bool = True,
    **more: Any,
) -> Kind:
    return Kind(family, vision, text or {}, more, split, places)


MHA: dict[str, Any] = {"num_key_value_heads": 4}
TIED: dict[str, Any] = {"tie_word_embeddings": True}
KINDS = {
    "LLaVA": _kind("Llava", CLIP, MHA),
    "LLaVA, class token": _kind(
        "Llava", CLIP, vision_feature_layer=-1, multimodal_projector_bias=False,
        projector_hidden_act="gelu_pytorch_tanh", **FULL,
    ),
    "LLaVA, an early layer": _kind("Llava", CLIP, {"rope_parameters": LINEAR}, vision_feature_layer=1),
    "LLaVA, no block at all": _kind("Llava", {**CLIP, "hidden_act": "gelu"}, vision_feature_layer=-4),
    "LLaVA, SigLIP": _kind("Llava", SIGLIP, TIED, **FULL),
    "LLaVA, SigLIP, last layer": _kind(
        "Llava", {**SIGLIP, "vision_use_head": False}, {"rope_parameters": LLAMA3}, vision_feature_layer=-1, **FULL
    ),
    "LLaVA, DINOv2": _kind("Llava", DINOV2),
    "LLaVA, DINOv2, registers": _kind("Llava", REGISTERS, vision_feature_layer=-1, **FULL),
    "LLaVA-NeXT": _kind("LlavaNext", CLIP, MHA, image_grid_pinpoints=WIDE),
    "LLaVA-NeXT, tall": _kind(
        "LlavaNext", CLIP, {"rope_parameters": LINEAR}, image_grid_pinpoints=TALL, vision_feature_layer=2
    ),
    "LLaVA-NeXT, SigLIP": _kind("LlavaNext", SIGLIP, image_grid_pinpoints=BIG, **TIED, **FULL),
    "LLaVA-NeXT, Mistral": _kind(
        "LlavaNext", CLIP, {"model_type": "mistral", "sliding_window": None}, image_grid_pinpoints=WIDE
    ),
    "Idefics3": _kind("Idefics3", SQUARES, {"rope_parameters": LLAMA3}, scale_factor=2, places=False),
    "Idefics3, whole": _kind("Idefics3", THREES, MHA, scale_factor=3, split=False, **TIED),
    "SmolVLM": _kind("SmolVLM", THREES, {"num_key_value_heads": 1}, scale_factor=3),
    "SmolVLM, tied": _kind("SmolVLM", SQUARES, {"rope_parameters": LINEAR}, scale_factor=2, **TIED),
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """The same checkpoint here and there, and the folder that transformers wrote."""

    kind: Kind
    folder: Path
    theirs: Any
    their_processor: Any
    ours: VisionLanguageModel
    our_processor: Processor

    def their_inputs(self, conversation: list[dict[str, Any]]) -> Any:
        return self.their_processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )


def pair(kind: Kind | str, folder: Path) -> Pair:
    """A kind, or one of `KINDS`, written to a folder and read from it."""
    kind = KINDS[kind] if isinstance(kind, str) else kind
    theirs = peer(kind)
    theirs.save_pretrained(folder)
    their_processor = write_processor(kind, folder)
    ours, our_processor = lmm.load(folder, dtype=torch.float32)
    assert isinstance(ours, VisionLanguageModel)
    return Pair(kind, folder, theirs, their_processor, ours, our_processor)


def configuration(kind: Kind) -> Any:
    words = tokenizer(kind.places)
    text = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(words), "max_position_embeddings": 1024,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, **kind.text,
    }  # fmt: skip
    image = words.convert_tokens_to_ids("<image>")
    own = {"image_token_id": image} if kind.of_squares else {"image_token_index": image, "image_seq_length": 16}
    made = getattr(transformers, f"{kind.family}Config")
    return made(vision_config=dict(kind.vision), text_config=text, **own, **kind.more)


def peer(kind: Kind) -> Any:
    """transformers' model with every parameter random."""
    model = getattr(transformers, f"{kind.family}ForConditionalGeneration")(configuration(kind)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            scales = ("norm" in name and name.endswith("weight")) or "lambda" in name
            value.copy_(scales + 0.25 * torch.randn(value.shape, generator=generator))
    return model


def write_processor(kind: Kind, folder: Path) -> Any:
    """transformers' processor, written as its version 5 does, or for SmolVLM in the files of the released models."""
    words, images = tokenizer(kind.places), _image_processor(kind)
    if kind.of_squares:
        tokens = (kind.vision["image_size"] // kind.vision["patch_size"] // kind.more["scale_factor"]) ** 2
        options = {"image_seq_len": tokens, "chat_template": IN_ORDER}
    else:
        tower = kind.vision["model_type"]
        extra = kind.vision.get("num_register_tokens", 0) + (tower != "siglip_vision_model")
        options = {
            "patch_size": kind.vision["patch_size"], "num_additional_image_tokens": extra,
            "vision_feature_select_strategy": kind.more.get("vision_feature_select_strategy", "default"),
            "chat_template": IMAGES_FIRST,
        }  # fmt: skip
    made = getattr(transformers, f"{kind.family}Processor")
    if kind.family != "SmolVLM":
        processor = made(images, words, **options)
        processor.save_pretrained(folder)
        return processor
    # It asks for a video processor, and for a library that spells numbers, which pictures do not need.
    module = sys.modules[made.__module__]
    unchecked = mock.patch.object(made, "check_argument_for_proper_class", lambda *_: None)
    with unchecked, mock.patch.object(module, "num2words", str):
        processor = made(images, words, video_processor=SimpleNamespace(num_frames=1, fps=1), **options)
    words.save_pretrained(folder)
    images.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": IN_ORDER}))
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_len": options["image_seq_len"]}))
    return processor


def _image_processor(kind: Kind) -> Any:
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    side = kind.vision["image_size"]
    square = {"height": side, "width": side}
    if kind.of_squares:
        made = Idefics3ImageProcessorPil if kind.family == "Idefics3" else SmolVLMImageProcessorPil
        sizes = {"size": {"longest_edge": 4 * side}, "max_image_size": {"longest_edge": side}}
        return made(**sizes, do_image_splitting=kind.split)
    if kind.family == "LlavaNext":
        grids = {"image_grid_pinpoints": kind.more["image_grid_pinpoints"]}
        return LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size=square, **grids)
    if kind.vision["model_type"] == "siglip_vision_model":
        return SiglipImageProcessorPil(size=square)
    made = CLIPImageProcessorPil if kind.vision["model_type"] == "clip_vision_model" else BitImageProcessorPil
    return made(size={"shortest_edge": side}, crop_size=square)


# --- conversations ---------------------------------------------------------------------------------------------------


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise."""
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(width * 10_007 + height).integers(0, 256, shape, np.uint8), mode)


def said(role: str, *parts: str | Image.Image) -> dict[str, Any]:
    """One message."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": role, "content": content}


def conversations() -> dict[str, list[dict[str, Any]]]:
    """One picture, several, none; before and after the text, in a later turn; of ordinary and of extreme shapes."""
    return {
        "one": [said("user", picture(50, 37), "what is this?")],
        "several": [said("user", "hello ", picture(91, 20), " and ", picture(33, 77), " \n\nand ", picture(28, 28))],
        "after the text": [said("system", "hello"), said("user", "what is this?", picture(64, 64))],
        "later": [
            said("user", "hello", picture(20, 60)),
            said("assistant", "a picture"),
            said("user", picture(100, 45), "and this?"),
        ],
        "none": [said("user", "hello"), said("assistant", "hello"), said("user", "what is this?")],
        "thin": [said("user", picture(1, 50), "what", picture(333, 20), "is this?")],
        "a pixel": [said("user", picture(1, 1), "what is this?")],
    }


def images_of(conversation: list[dict[str, Any]]) -> list[Image.Image]:
    return [part["image"] for message in conversation for part in message["content"] if part["type"] == "image"]


def tiles_of(theirs: Mapping[str, Any], ours: ModelInputs) -> torch.Tensor:
    """transformers' pixel values as ours lie, [M, 3, S, S]; what pads LLaVA-NeXT's pictures to the longest is zero."""
    values = theirs["pixel_values"]
    if values.ndim == 4:
        return values
    if len(values) == 1 and len(ours.images) > 1:  # Idefics3: all squares of a row
        return values[0]
    counts = [image.num_tiles for image in ours.images]
    assert not any(value[count:].any() for value, count in zip(values, counts))
    return torch.cat([value[:count] for value, count in zip(values, counts)])
