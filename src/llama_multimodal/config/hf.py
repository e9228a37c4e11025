"""`config.json` of transformers, read and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError
from .checks import HF_IGNORED, build, check_keys, expect, section
from .model import AnyModelConfig, LanguageModelConfig, ModelConfig
from .text import LinearRopeScaling, RopeScaling, TextConfig
from .vision import TiledVisionConfig


def config_from_hf(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> AnyModelConfig:
    """`config.json` (and `generation_config.json`, whose stop tokens win) of an mllama or a llama checkpoint.

    Raises:
        ConfigError: another `model_type`, an unknown key, a missing key, or a value this project does not implement.
    """
    if raw.get("model_type") not in _READERS:
        raise ConfigError(f'config.json has model_type "{raw.get("model_type")}"; supported: {", ".join(_READERS)}')
    return _READERS[raw["model_type"]](raw, generation or {})


def _mllama_from_hf(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
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


_LLAMA = {  # what transformers takes where a llama config.json is silent
    "vocab_size": 32000, "intermediate_size": 11008, "num_hidden_layers": 32, "max_position_embeddings": 2048,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_ids": (2,), "pad_token_id": 0,
    "cross_attention_layers": (), "num_extra_embeddings": 0,
}  # fmt: skip
_LLAMA_IGNORED = {
    "attention_bias", "head_dim", "is_llama_config", "mlp_bias", "pretraining_tp", "rope_interleaved",
    "transformers.js_config",
}  # fmt: skip


def _llama_from_hf(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> LanguageModelConfig:
    where = "config.json"
    for key in ("attention_bias", "mlp_bias", "rope_interleaved"):
        expect(raw, key, False, where)
    expect(raw, "quantization_config", None, where)
    heads = raw.get("num_attention_heads", 32)
    defaults = {**_LLAMA, "num_attention_heads": heads, "num_key_value_heads": heads}
    tied = bool(raw.get("tie_word_embeddings", False))
    plain = {key: value for key, value in raw.items() if key not in {*_LLAMA_IGNORED, "tie_word_embeddings"}}
    text = text_from_hf(plain, generation, where, {**defaults, "tie_word_embeddings": tied})
    expect(raw, "head_dim", text.head_dim, where)
    return LanguageModelConfig(text)


def text_from_hf(
    raw: Mapping[str, Any], generation: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None
) -> TextConfig:
    """A decoder's table; defaults: for keys that it lacks, where those of `TextConfig` are not the family's."""
    names = {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
    }  # fmt: skip
    known = {*names, "rope_theta", "rope_scaling", "rope_parameters", "cross_attention_layers", "hidden_act"}
    check_keys(raw, {*known, *HF_IGNORED}, where)
    expect(raw, "hidden_act", "silu", where)
    expect(raw, "tie_word_embeddings", False, where)
    given = {**(defaults or {}), **{name: raw[name] for name in names if raw.get(name) is not None}}
    if "cross_attention_layers" in raw:
        given["cross_attention_layers"] = tuple(raw["cross_attention_layers"])
    # transformers 5 moved theta and scaling into `rope_parameters`.
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", raw.get("rope_theta"))
    if theta is not None:
        given["rope_theta"] = float(theta)
    given["rope_scaling"] = rope_scaling_from_hf(rope, where)
    for name in ("bos_token_id", "pad_token_id"):
        value = generation.get(name, raw.get(name))
        if value is not None:
            given[name] = int(value)
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    if eos is not None:
        given["eos_token_ids"] = tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
    return build(TextConfig, given, where)


def rope_scaling_from_hf(raw: Mapping[str, Any], where: str) -> RopeScaling | LinearRopeScaling | None:
    """The `rope_scaling` / `rope_parameters` table of a config; None for the unscaled rotary embedding."""
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return None
    if kind not in _ROPE:
        raise ConfigError(f'{where}: rope type "{kind}" is not implemented; supported: default, {", ".join(_ROPE)}')
    known = {field.name for field in dataclasses.fields(_ROPE[kind])}
    check_keys(raw, {*known, "rope_type", "type"}, f"{where}: rope_scaling")
    return build(_ROPE[kind], {k: v for k, v in raw.items() if k in known}, where)


_ROPE: dict[str, type[Any]] = {"llama3": RopeScaling, "linear": LinearRopeScaling}
_READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], AnyModelConfig]] = {
    "mllama": _mllama_from_hf,
    "llama": _llama_from_hf,
}


def config_to_hf(config: AnyModelConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads for this model."""
    text = _text_to_hf(config.text)
    if isinstance(config, LanguageModelConfig):
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **text}
    text["cross_attention_layers"] = list(config.text.cross_attention_layers)
    vision = dataclasses.asdict(config.vision)
    vision["attention_heads"] = vision.pop("num_attention_heads")
    vision["intermediate_layers_indices"] = list(config.vision.intermediate_layers_indices)
    vision["supported_aspect_ratios"] = [list(pair) for pair in config.vision.aspect_ratios]
    vision["vision_output_dim"] = config.vision.output_size
    vision["hidden_act"] = "gelu"
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": config.image_token_id,
        "text_config": {"model_type": "mllama_text_model", **text},
        "vision_config": {"model_type": "mllama_vision_model", **vision},
    }


def _text_to_hf(config: TextConfig) -> dict[str, Any]:
    text = {
        key: value for key, value in dataclasses.asdict(config).items()
        if key not in {"num_extra_embeddings", "eos_token_ids", "rope_scaling", "cross_attention_layers"}
    }  # fmt: skip
    text["eos_token_id"] = list(config.eos_token_ids)
    text["hidden_act"] = "silu"
    scaling = config.rope_scaling
    kind = next((kind for kind, cls in _ROPE.items() if isinstance(scaling, cls)), None)
    text["rope_scaling"] = {"rope_type": kind, **dataclasses.asdict(scaling)} if scaling else None
    return text
