"""`config.json` of a model put together from parts: our own format, which holds every combination.

{"model_type": "llama_multimodal", "fusion": "cross_attention", "image_token_id": 128256,
 "vision": {"type": "siglip", "hidden_size": 1152, …}, "projector": {"type": "mlp", …},
 "text": {"hidden_size": 2048, …}}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .checks import HF_IGNORED, check_keys, from_dict, section
from .hf_text import rope_scaling_from_hf, rope_scaling_to_hf
from .model import ModelConfig
from .parts import PROJECTORS, VISION, part_from_dict, part_to_dict
from .text import TextConfig

ASSEMBLED = "llama_multimodal"
_OWN = ("fusion", "image_token_id", "grid_pinpoints")


def assembled_from_hf(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    check_keys(raw, {*_OWN, "vision", "projector", "text", *HF_IGNORED}, "config.json")
    text = dict(section(raw, "text"))
    text["rope_scaling"] = rope_scaling_from_hf(text.get("rope_scaling") or {}, "config.json: text")
    own: dict[str, Any] = {key: raw[key] for key in _OWN if key in raw}
    if "grid_pinpoints" in own:
        own["grid_pinpoints"] = tuple((int(h), int(w)) for h, w in own["grid_pinpoints"])
    return ModelConfig(
        vision=part_from_dict(VISION, section(raw, "vision"), "config.json: vision"),
        text=from_dict(TextConfig, text, "config.json: text"),
        projector=part_from_dict(PROJECTORS, section(raw, "projector"), "config.json: projector"),
        model_type=ASSEMBLED,
        **own,
    )


def assembled_to_hf(config: ModelConfig) -> dict[str, Any]:
    text = dataclasses.asdict(config.text) | {"rope_scaling": rope_scaling_to_hf(config.text.rope_scaling)}
    return {
        "model_type": ASSEMBLED,
        **{key: getattr(config, key) for key in _OWN},
        "vision": part_to_dict(VISION, config.vision),
        "projector": part_to_dict(PROJECTORS, config.projector),
        "text": text,
    }
