"""The configurations of the known checkpoints, for what is asked of them before they are there: how much memory they
take, say. The embedded model's lies with its weights, in `registry.EMBEDDED_FOLDER`.
"""

from __future__ import annotations

from typing import Any

from ..config import (
    LLAMA_3_2_11B_VISION,
    LLAMA_3_2_90B_VISION,
    AnyModelConfig,
    LanguageModelConfig,
    RopeScaling,
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

CONFIGS: dict[str, AnyModelConfig] = {
    "meta-llama/Llama-3.2-11B-Vision-Instruct": LLAMA_3_2_11B_VISION,
    "meta-llama/Llama-3.2-11B-Vision": LLAMA_3_2_11B_VISION,
    "meta-llama/Llama-3.2-90B-Vision-Instruct": LLAMA_3_2_90B_VISION,
    "meta-llama/Llama-3.2-90B-Vision": LLAMA_3_2_90B_VISION,
    "meta-llama/Llama-3.2-1B-Instruct": _text(2048, 8192, 16, 32, 8, **_LLAMA_3_2),
    "meta-llama/Llama-3.2-3B-Instruct": _text(3072, 8192, 28, 24, 8, **_LLAMA_3_2),
    "meta-llama/Llama-3.1-8B-Instruct": _text(4096, 14336, 32, 32, 8),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _text(576, 1536, 30, 9, 3, **_SMOLLM2),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _text(960, 2560, 32, 15, 5, **_SMOLLM2),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _text(2048, 8192, 24, 32, 32, **_SMOLLM2 | {"rope_theta": 130000.0}),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _text(
        2048, 5632, 22, 32, 4, **_LLAMA_2 | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
    ),
    "lmsys/vicuna-7b-v1.5": _text(4096, 11008, 32, 32, 32, **_LLAMA_2 | {"max_position_embeddings": 4096}),
}
"""Sizes, by the name in `registry`. Token ids are those of the family; a checkpoint's own may name more stop tokens."""
