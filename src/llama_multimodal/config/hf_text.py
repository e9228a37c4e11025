"""The decoder's part of `config.json`, read and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .checks import HF_IGNORED, build, check_keys, expect
from .text import LinearRopeScaling, RopeScaling, TextConfig

_LLAMA = {  # what transformers takes where a llama config.json is silent
    "vocab_size": 32000, "intermediate_size": 11008, "num_hidden_layers": 32, "max_position_embeddings": 2048,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_ids": (2,), "pad_token_id": 0,
    "cross_attention_layers": (), "num_extra_embeddings": 0,
}  # fmt: skip
_MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}  # what differs
_MISTRAL_WINDOW = 4096
_LLAMA_IGNORED = {
    "attention_bias", "head_dim", "is_llama_config", "mlp_bias", "pretraining_tp", "rope_interleaved",
    "transformers.js_config",
    # left in SmolVLM's files by its training
    "_flash_attn_2_enabled", "neftune_noise_alpha", "perceiver_config", "pixel_shuffle_factor", "qk_layer_norms",
    "use_resampler",
}  # fmt: skip


def llama_text_from_hf(raw: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> TextConfig:
    """The table of a Llama decoder, a whole `config.json` or the `text_config` in one; defaults as in transformers.

    Mistral's decoder is the same where its window holds the whole context.

    Raises:
        ConfigError: an unknown key, a missing key, or a value this project does not implement.
    """
    kind = raw.get("model_type") or "llama"
    if kind not in ("llama", "mistral"):
        raise ConfigError(f'{where}: model_type "{kind}" is not implemented; supported: llama, mistral')
    for key in ("attention_bias", "mlp_bias", "rope_interleaved", "qk_layer_norms", "use_resampler"):
        expect(raw, key, False, where)
    heads = raw.get("num_attention_heads", 32)
    defaults = {**_LLAMA, "num_attention_heads": heads, "num_key_value_heads": heads}
    ignored = {*_LLAMA_IGNORED, "tie_word_embeddings"}
    if kind == "mistral":
        defaults |= _MISTRAL
        ignored.add("sliding_window")
    tied = bool(raw.get("tie_word_embeddings", False))
    plain = {key: value for key, value in raw.items() if key not in ignored}
    text = text_from_hf(plain, generation, where, {**defaults, "tie_word_embeddings": tied})
    expect(raw, "head_dim", text.head_dim, where)
    if kind == "mistral":
        _check_window(raw.get("sliding_window", _MISTRAL_WINDOW), text.max_position_embeddings, where)
    return text


def _check_window(window: Any, context: int, where: str) -> None:
    if window is not None and not (isinstance(window, int) and window >= context):
        raise ConfigError(
            f"{where}: sliding_window is {window!r} ({_MISTRAL_WINDOW} where the file does not say), less than the"
            f" context of {context} (max_position_embeddings); attention within a window is not implemented"
        )


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


def rope_scaling_to_hf(scaling: RopeScaling | LinearRopeScaling | None) -> dict[str, Any] | None:
    kind = next((kind for kind, cls in _ROPE.items() if isinstance(scaling, cls)), None)
    return {"rope_type": kind, **dataclasses.asdict(scaling)} if scaling else None


def text_to_hf(config: TextConfig) -> dict[str, Any]:
    """The decoder's table as transformers reads it, without the cross-attention layers."""
    text = {
        key: value for key, value in dataclasses.asdict(config).items()
        if key not in {"num_extra_embeddings", "eos_token_ids", "rope_scaling", "cross_attention_layers"}
    }  # fmt: skip
    text["eos_token_id"] = list(config.eos_token_ids)
    text["hidden_act"] = "silu"
    text["rope_scaling"] = rope_scaling_to_hf(config.rope_scaling)
    return text
