"""`config.json` of Llama 3.2 Vision, read and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .checks import HF_IGNORED, build, check_keys, expect, section
from .hf_text import text_from_hf, text_to_hf
from .model import ModelConfig
from .vision import TiledVisionConfig


def mllama_from_hf(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    check_keys(raw, {"vision_config", "text_config", "image_token_index", *HF_IGNORED}, "config.json")
    vision, text = section(raw, "vision_config"), section(raw, "text_config")
    return ModelConfig(
        vision=vision_from_hf(vision),
        text=text_from_hf(text, generation, "config.json: text_config"),
        image_token_id=int(raw.get("image_token_index", 128256)),
    )


def vision_from_hf(raw: Mapping[str, Any]) -> TiledVisionConfig:
    where = "config.json: vision_config"
    names = {
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_hidden_layers": "num_hidden_layers",
        "num_global_layers": "num_global_layers",
        "num_channels": "num_channels",
        "image_size": "image_size",
        "patch_size": "patch_size",
        "max_num_tiles": "max_num_tiles",
        "norm_eps": "norm_eps",
    }
    heads = "num_attention_heads" if "num_attention_heads" in raw else "attention_heads"
    known = {*names, "attention_heads", "num_attention_heads", "intermediate_layers_indices"}
    check_keys(raw, {*known, "hidden_act", "vision_output_dim", "supported_aspect_ratios", *HF_IGNORED}, where)
    expect(raw, "hidden_act", "gelu", where)
    given = {ours: raw[theirs] for theirs, ours in names.items() if theirs in raw}
    if heads in raw:
        given["num_attention_heads"] = raw[heads]
    if "intermediate_layers_indices" in raw:
        given["intermediate_layers_indices"] = tuple(raw["intermediate_layers_indices"])
    config = build(TiledVisionConfig, given, where)
    expect(raw, "vision_output_dim", config.output_size, where)
    if "supported_aspect_ratios" in raw:
        stated = tuple(tuple(pair) for pair in raw["supported_aspect_ratios"])
        if stated != config.aspect_ratios:
            raise ConfigError(f"{where}: supported_aspect_ratios is not the list for {config.max_num_tiles} tiles")
    return config


def mllama_to_hf(config: ModelConfig) -> dict[str, Any]:
    text = {**text_to_hf(config.text), "cross_attention_layers": list(config.text.cross_attention_layers)}
    tiled = config.tiled
    vision = dataclasses.asdict(tiled)
    vision["attention_heads"] = vision.pop("num_attention_heads")
    vision["intermediate_layers_indices"] = list(tiled.intermediate_layers_indices)
    vision["supported_aspect_ratios"] = [list(pair) for pair in tiled.aspect_ratios]
    vision["vision_output_dim"] = tiled.output_size
    vision["hidden_act"] = "gelu"
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": config.image_token_id,
        "text_config": {"model_type": "mllama_text_model", **text},
        "vision_config": {"model_type": "mllama_vision_model", **vision},
    }
