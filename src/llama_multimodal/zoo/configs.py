"""The configurations of the known checkpoints, for what is asked of them before they are there: how much memory they
take, say. The embedded model's lies with its weights, in `registry.EMBEDDED_FOLDER`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import (
    LLAMA_3_2_11B_VISION,
    LLAMA_3_2_90B_VISION,
    AnyModelConfig,
    ClipVisionConfig,
    LanguageModelConfig,
    MLPProjector,
    ModelConfig,
    PixelShuffleProjector,
    RopeScaling,
    SiglipConfig,
    TextConfig,
)


def _text(
    hidden_size: int, intermediate_size: int, layers: int, heads: int, kv_heads: int, **other: Any
) -> LanguageModelConfig:
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": layers}
    alone = {"cross_attention_layers": (), "num_extra_embeddings": 0}
    text = TextConfig(**{**sizes, **alone, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **other})
    return LanguageModelConfig(text)


_SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000.0, "rope_scaling": None,
    "bos_token_id": 1, "eos_token_ids": (2,), "pad_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
_LLAMA_2: dict[str, Any] = {
    "vocab_size": 32000, "rope_theta": 10000.0, "rope_scaling": None, "bos_token_id": 1, "eos_token_ids": (2,),
    "pad_token_id": 0,
}  # fmt: skip
_LLAMA_3_2: dict[str, Any] = {"rope_scaling": RopeScaling(factor=32.0), "tie_word_embeddings": True}
_LLAMA_3_2_1B = _text(2048, 8192, 16, 32, 8, **_LLAMA_3_2)


# --- models whose pictures take the place of tokens ------------------------------------------------------------------

_CLIP_L = ClipVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
    patch_size=14, layer=-2, with_class_token=False,
)  # fmt: skip
_SIGLIP_B = SiglipConfig(image_size=512, pooling_head=False)
_SIGLIP_SO400M = SiglipConfig(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
    patch_size=14, pooling_head=False,
)  # fmt: skip
_VICUNA: dict[str, Any] = _LLAMA_2 | {"vocab_size": 32064, "max_position_embeddings": 4096}
_MISTRAL: dict[str, Any] = _VICUNA | {"max_position_embeddings": 32768, "rope_theta": 1000000.0}
_SMOL: dict[str, Any] = _SMOLLM2 | {"vocab_size": 49280, "tie_word_embeddings": False}
_SMOL_LARGE: dict[str, Any] = _SMOL | {
    "vocab_size": 49155, "max_position_embeddings": 16384, "rope_theta": 273768.0,
}  # fmt: skip
_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def _llava(text: LanguageModelConfig, **other: Any) -> ModelConfig:
    given: dict[str, Any] = {"image_token_id": 32000, "fusion": "splice", "model_type": "llava", **other}
    return ModelConfig(_CLIP_L, text.text, projector=MLPProjector(), **given)


def _idefics3(vision: SiglipConfig, text: LanguageModelConfig, scale_factor: int, image_token_id: int) -> ModelConfig:
    projector = PixelShuffleProjector(scale_factor)
    return ModelConfig(vision, text.text, image_token_id, projector, fusion="splice", model_type="idefics3")


CONFIGS: dict[str, AnyModelConfig] = {
    "meta-llama/Llama-3.2-11B-Vision-Instruct": LLAMA_3_2_11B_VISION,
    "meta-llama/Llama-3.2-11B-Vision": LLAMA_3_2_11B_VISION,
    "meta-llama/Llama-3.2-90B-Vision-Instruct": LLAMA_3_2_90B_VISION,
    "meta-llama/Llama-3.2-90B-Vision": LLAMA_3_2_90B_VISION,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_3_2_1B,
    "meta-llama/Llama-3.2-3B-Instruct": _text(3072, 8192, 28, 24, 8, **_LLAMA_3_2),
    "meta-llama/Llama-3.1-8B-Instruct": _text(4096, 14336, 32, 32, 8),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _text(576, 1536, 30, 9, 3, **_SMOLLM2),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _text(960, 2560, 32, 15, 5, **_SMOLLM2),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _text(2048, 8192, 24, 32, 32, **_SMOLLM2 | {"rope_theta": 130000.0}),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _text(
        2048, 5632, 22, 32, 4, **_LLAMA_2 | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
    ),
    "lmsys/vicuna-7b-v1.5": _text(4096, 11008, 32, 32, 32, **_LLAMA_2 | {"max_position_embeddings": 4096}),
    "llava-hf/llava-1.5-7b-hf": _llava(_text(4096, 11008, 32, 32, 32, **_VICUNA)),
    "llava-hf/llava-v1.6-vicuna-7b-hf": _llava(
        _text(4096, 11008, 32, 32, 32, **_VICUNA), grid_pinpoints=_PINPOINTS, model_type="llava_next"
    ),
    "llava-hf/llava-v1.6-mistral-7b-hf": _llava(
        _text(4096, 14336, 32, 32, 8, **_MISTRAL), grid_pinpoints=_PINPOINTS, model_type="llava_next"
    ),
    "HuggingFaceM4/Idefics3-8B-Llama3": _idefics3(
        replace(_SIGLIP_SO400M, image_size=364),
        _text(4096, 14336, 32, 32, 8, vocab_size=128259, eos_token_ids=(128001,), pad_token_id=128002), 2, 128257,
    ),
    "HuggingFaceTB/SmolVLM-256M-Instruct": _idefics3(_SIGLIP_B, _text(576, 1536, 30, 9, 3, **_SMOL), 4, 49190),
    "HuggingFaceTB/SmolVLM-500M-Instruct": _idefics3(_SIGLIP_B, _text(960, 2560, 32, 15, 5, **_SMOL), 4, 49190),
    "HuggingFaceTB/SmolVLM-Instruct": _idefics3(
        _SIGLIP_SO400M, _text(2048, 8192, 24, 32, 32, **_SMOL_LARGE), 3, 49153
    ),
}  # fmt: skip
"""Sizes, by the name in `registry`. Token ids are those of the family; a checkpoint's own may name more stop tokens."""

ASSEMBLED: dict[str, AnyModelConfig] = {
    "siglip-llama-1b": ModelConfig(
        _SIGLIP_SO400M,
        replace(
            _LLAMA_3_2_1B.text, num_hidden_layers=20, cross_attention_layers=(3, 8, 13, 18), num_extra_embeddings=1
        ),
        projector=MLPProjector(),
        model_type="llama_multimodal",
    ),
}
"""What `from_parts` makes of known parts: SigLIP so400m (patch 14, 384 pixels) and Llama 3.2 1B, with gated blocks."""

SIZES = {
    "1B": "meta-llama/Llama-3.2-1B-Instruct",
    "3B": "meta-llama/Llama-3.2-3B-Instruct",
    "11B": "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "90B": "meta-llama/Llama-3.2-90B-Vision-Instruct",
}
"""Llama 3.2's sizes by themselves."""


def find_config(name: str) -> AnyModelConfig | None:
    """The configuration of a known checkpoint, of an assembled model, or of one of Llama 3.2's sizes."""
    return (CONFIGS | ASSEMBLED).get(SIZES.get(name.upper(), name))
