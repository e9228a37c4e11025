"""`config.json` of the models whose features take the place of placeholders: LLaVA 1.5 and NeXT, Idefics3, SmolVLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import ConfigError
from .checks import HF_IGNORED, build, check_keys, expect, section
from .encoders import ClipVisionConfig, Dinov2Config, EncoderConfig, SiglipConfig, encoder_from_hf, encoder_to_hf
from .hf_text import llama_text_from_hf, text_to_hf
from .model import ModelConfig
from .projectors import MLPProjector, PixelShuffleProjector
from .text import TextConfig

_TEXT, _VISION = "config.json: text_config", "config.json: vision_config"

# --- LLaVA -----------------------------------------------------------------------------------------------------------

_LLAVA_KNOWN = {
    "vision_config", "text_config", "image_token_index", "image_token_id", "projector_hidden_act",
    "vision_feature_select_strategy", "vision_feature_layer", "multimodal_projector_bias",
}  # fmt: skip
_LLAVA_IGNORED = {"ignore_index", "image_seq_length", "vocab_size"}  # restated, or for the loss
_NEXT_KNOWN = {"image_grid_pinpoints", "use_image_newline_parameter"}
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def llava_from_hf(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    where = "config.json"
    following = raw["model_type"] == "llava_next"
    check_keys(raw, {*_LLAVA_KNOWN, *_LLAVA_IGNORED, *(_NEXT_KNOWN if following else ()), *HF_IGNORED}, where)
    expect(raw, "use_image_newline_parameter", True, where)
    layer = raw.get("vision_feature_layer", -2)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ConfigError(f"{where}: vision_feature_layer is {layer!r}; features of one layer are read, not of several")
    strategy = raw.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise ConfigError(f'{where}: vision_feature_select_strategy "{strategy}" is not implemented; default, full')
    act = raw.get("projector_hidden_act", "gelu")
    projector: dict[str, Any] = {"bias": bool(raw.get("multimodal_projector_bias", True)), "hidden_act": act}
    pinpoints = raw.get("image_grid_pinpoints") or _PINPOINTS if following else []
    text = _text(raw, generation)
    return ModelConfig(
        vision=_llava_vision(section(raw, "vision_config"), layer, whole=strategy == "full"),
        text=text,
        image_token_id=_image_token(raw, 32000),
        projector=build(MLPProjector, projector, where),
        fusion="splice",
        grid_pinpoints=tuple((int(height), int(width)) for height, width in pinpoints),
        model_type=raw["model_type"],
    )


def _llava_vision(raw: Mapping[str, Any], layer: int, *, whole: bool) -> EncoderConfig:
    """The encoder up to the layer that is read, with its class token or without."""
    if raw.get("model_type", "clip_vision_model") == "clip_vision_model":  # with a leftover of the text tower's
        plain = {key: value for key, value in raw.items() if key != "vocab_size"}
        raw = {**plain, "model_type": "clip_vision_model"}
    config = encoder_from_hf(raw, _VISION, layer=layer)
    if not whole and isinstance(config, SiglipConfig):
        raise ConfigError(
            f'{_VISION}: SigLIP has no class token to leave out; vision_feature_select_strategy is "full"'
        )
    return config if isinstance(config, SiglipConfig) else replace(config, with_class_token=whole)


def llava_to_hf(config: ModelConfig) -> dict[str, Any]:
    vision, projector = config.vision, config.projector
    assert isinstance(vision, SiglipConfig | ClipVisionConfig | Dinov2Config) and isinstance(projector, MLPProjector)
    if projector.hidden_size not in (None, config.text.hidden_size):
        own = f"LLaVA's projector is as wide as the decoder, and this one is {projector.hidden_size} wide between"
        raise ConfigError(f'{own}; give the configuration model_type="llama_multimodal", whose files hold any')
    following = (
        {"image_grid_pinpoints": [list(pair) for pair in config.grid_pinpoints]} if config.grid_pinpoints else {}
    )
    return {
        "architectures": [f"Llava{'Next' if following else ''}ForConditionalGeneration"],
        "model_type": config.model_type,
        "image_token_index": config.image_token_id,
        "multimodal_projector_bias": projector.bias,
        "projector_hidden_act": projector.hidden_act,
        "vision_feature_layer": vision.num_hidden_layers if vision.layer is None else vision.layer,
        "vision_feature_select_strategy": "full" if getattr(vision, "with_class_token", True) else "default",
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "image_seq_length": config.num_tokens(vision.image_size, vision.image_size),
        **following,
        "text_config": {"model_type": "llama", **text_to_hf(config.text)},
        "vision_config": encoder_to_hf(vision),
    }


# --- Idefics3 and SmolVLM --------------------------------------------------------------------------------------------

_IDEFICS3_VISION = {  # transformers' defaults
    "hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 32,
}  # fmt: skip
_IDEFICS3_KNOWN = {"vision_config", "text_config", "image_token_id", "scale_factor"}
_IDEFICS3_IGNORED = {
    "_pad_token_id", "image_seq_len", "transformers.js_config",
    # left by the training
    "_flash_attn_2_enabled", "freeze_lm_head", "freeze_text_layers", "freeze_text_module_exceptions",
    "freeze_vision_layers", "freeze_vision_module_exceptions", "neftune_noise_alpha", "perceiver_config",
    "pixel_shuffle_factor", "qk_layer_norms", "use_reentrant_checkpointing", "use_resampler",
    # the decoder's; text_config is what holds
    "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings",
    "mlp_bias", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pretraining_tp", "rms_norm_eps",
    "rope_scaling", "rope_theta", "vocab_size",
}  # fmt: skip
_IDEFICS3_TOWERS = ("idefics3", "idefics3_vision", "smolvlm", "smolvlm_vision", "siglip_vision_model")  # one encoder
_VISION_IGNORED = {"max_image_size", "size", "use_base_siglip"}  # of the preprocessor, or left by the training


def idefics3_from_hf(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    check_keys(raw, {*_IDEFICS3_KNOWN, *_IDEFICS3_IGNORED, *HF_IGNORED}, "config.json")
    table = section(raw, "vision_config")
    kind = table.get("model_type", "idefics3")
    if kind not in _IDEFICS3_TOWERS:
        known = ", ".join(_IDEFICS3_TOWERS)
        raise ConfigError(f'{_VISION}: model_type "{kind}" is no encoder of {raw["model_type"]}; supported: {known}')
    vision = {key: value for key, value in table.items() if key not in _VISION_IGNORED}
    vision = {**_IDEFICS3_VISION, **vision, "model_type": "siglip_vision_model", "vision_use_head": False}
    projector = {"scale_factor": raw.get("scale_factor", 2)}
    return ModelConfig(
        vision=encoder_from_hf(vision, _VISION),
        text=_text(raw, generation),
        image_token_id=_image_token(raw, 128257),
        projector=build(PixelShuffleProjector, projector, "config.json"),
        fusion="splice",
        model_type=raw["model_type"],
    )


def idefics3_to_hf(config: ModelConfig) -> dict[str, Any]:
    vision, projector = config.vision, config.projector
    assert isinstance(vision, SiglipConfig) and isinstance(projector, PixelShuffleProjector)
    table = {key: value for key, value in encoder_to_hf(vision).items() if key != "vision_use_head"}
    name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[config.model_type]
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": config.model_type,
        "image_token_id": config.image_token_id,
        "scale_factor": projector.scale_factor,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "text_config": {"model_type": "llama", **text_to_hf(config.text)},
        "vision_config": {**table, "model_type": f"{config.model_type}_vision"},
    }


# --- both ------------------------------------------------------------------------------------------------------------


def _text(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> TextConfig:
    """The decoder. Whether its embedding is its LM head stands beside its table; LLaVA 1.5 looks into it as well."""
    table = section(raw, "text_config")
    beside, within = raw.get("tie_word_embeddings"), bool(table.get("tie_word_embeddings"))
    tied = within if beside is None else bool(beside) or (within and raw["model_type"] == "llava")
    return llama_text_from_hf({**table, "tie_word_embeddings": tied}, generation, _TEXT)


def _image_token(raw: Mapping[str, Any], default: int) -> int:
    value = raw.get("image_token_id", raw.get("image_token_index", default))
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"config.json: image_token_id must be a whole number, not {value!r}")
    return value
