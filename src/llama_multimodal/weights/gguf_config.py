"""The metadata of a GGUF file of the architecture `llama`: to a `LanguageModelConfig`.

Llama 3.1's frequency scaling is not in the metadata. llama.cpp stores its result, the numbers that the frequencies are
divided by; the parameters it was made with are recovered from them and checked against them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import LanguageModelConfig, LinearRopeScaling, RopeScaling, TextConfig
from ..config.checks import build, check_keys
from ..errors import ConfigError
from ..ops import rope_frequencies

_ARCHITECTURE = "llama"
_WHERE = "GGUF metadata"
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_RMS_EPS, _THETA = "attention.layer_norm_rms_epsilon", "rope.freq_base"
_HEAD_DIMS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
_ROPE = {"rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scale_linear"}
_KNOWN = {*_SIZES, _RMS_EPS, _THETA, *_HEAD_DIMS, *_ROPE, "attention.head_count_kv", "vocab_size", "expert_count"}
_IGNORED = {"expert_used_count", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.attn_factor"}
_CONTROL = 3
_STOPS = {"<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>"}
"""Control tokens that end an answer; the metadata names one or two of the three that Llama 3 has."""


def config_from_gguf(
    metadata: Mapping[str, Any], *, tied: bool = False, rope_factors: Tensor | None = None
) -> LanguageModelConfig:
    """The configuration of a file.

    tied: the file has no `output.weight`. rope_factors: `rope_freqs.weight`, [D/2], where the file has it

    Raises:
        ConfigError: another architecture, an unknown key of it, or a value that is missing, damaged or not implemented.
    """
    architecture = metadata.get("general.architecture")
    if architecture != _ARCHITECTURE:
        raise ConfigError(f"{_WHERE}: the architecture is {architecture!r}; supported: {_ARCHITECTURE}")
    prefix = f"{_ARCHITECTURE}."
    raw = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    check_keys(raw, _KNOWN | _IGNORED, f"{_WHERE}: {_ARCHITECTURE}")
    if raw.get("expert_count"):
        raise ConfigError(f"{_WHERE}: expert_count is {raw['expert_count']}; a mixture of experts is not implemented")
    missing = [key for key in (*_SIZES, _RMS_EPS) if key not in raw]
    if missing:
        raise ConfigError(f"{_WHERE}: {prefix}{missing[0]} is missing")
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    given = {
        **{ours: raw[theirs] for theirs, ours in _SIZES.items()},
        "num_key_value_heads": raw.get("attention.head_count_kv", raw["attention.head_count"]),
        "vocab_size": raw.get("vocab_size", len(tokens)),
        "rms_norm_eps": _fp32_as_written(raw[_RMS_EPS]),
        "rope_theta": _fp32_as_written(raw.get(_THETA, 10000.0)),
        "rope_scaling": None,
        "cross_attention_layers": (),
        "num_extra_embeddings": 0,
        "tie_word_embeddings": tied,
        **_token_ids(metadata),
    }
    for key, value in given.items():
        if key.startswith("num_") and key not in ("num_extra_embeddings", "num_hidden_layers") and value == 0:
            raise ConfigError(f"{_WHERE}: {key} is 0")
    if type(given["pad_token_id"]) is int and given["pad_token_id"] >= given["vocab_size"]:
        given["pad_token_id"] = 0  # never read, but it must have an embedding
    text = build(TextConfig, given, _WHERE)
    for key in _HEAD_DIMS:
        if raw.get(key, text.head_dim) != text.head_dim:
            raise ConfigError(f"{_WHERE}: {prefix}{key} is {raw[key]!r}; this model needs {text.head_dim}")
    scaling: RopeScaling | LinearRopeScaling | None = _stated_scaling(raw)
    if rope_factors is not None:
        if scaling is not None:
            raise ConfigError(f"{_WHERE}: linear scaling and rope_freqs.weight together are not implemented")
        scaling = scaling_from_factors(text, rope_factors, raw.get("rope.scaling.original_context_length"))
    return LanguageModelConfig(replace(text, rope_scaling=scaling))


def _fp32_as_written(value: Any) -> Any:
    """The shortest decimal number that is this fp32: 1e-05 for 9.999999747378752e-06."""
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    exact = torch.tensor(value, dtype=torch.float32)
    for digits in range(6, 10):
        if torch.equal(torch.tensor(short := float(f"{value:.{digits}g}"), dtype=torch.float32), exact):
            return short
    return value


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """bos, eos and padding; llama.cpp's own where a SentencePiece file is silent."""
    prefix = "tokenizer.ggml."
    sentencepiece = metadata.get(f"{prefix}model") == "llama"
    eos = metadata.get(f"{prefix}eos_token_id", 2 if sentencepiece else None)
    stated = [eos, *(metadata.get(f"{prefix}{name}_token_id") for name in ("eot", "eom"))]
    tokens, types = metadata.get(f"{prefix}tokens", ()), metadata.get(f"{prefix}token_type", ())
    named = [i for i, (token, kind) in enumerate(zip(tokens, types)) if kind == _CONTROL and token in _STOPS]
    if any(i is not None and type(i) is not int for i in stated):
        raise ConfigError(f"{_WHERE}: the ids of eos, eot and eom must be whole numbers, not {stated}")
    return {
        "bos_token_id": metadata.get(f"{prefix}bos_token_id", 1 if sentencepiece else eos or 0),
        "eos_token_ids": tuple(dict.fromkeys(i for i in [*stated, *named] if i is not None)),
        "pad_token_id": metadata.get(f"{prefix}padding_token_id", 0),
    }


def _stated_scaling(raw: Mapping[str, Any]) -> LinearRopeScaling | None:
    """The scaling that the metadata names; Llama 3.1's is not among them."""
    kind = raw.get("rope.scaling.type")
    if kind is None and "rope.scale_linear" in raw:  # how older files write it
        kind, raw = "linear", {"rope.scaling.factor": raw["rope.scale_linear"]}
    if kind in (None, "none"):
        return None
    if kind != "linear":
        raise ConfigError(f"{_WHERE}: the rotary scaling {kind!r} is not implemented; supported: none, linear, llama3")
    factor = raw.get("rope.scaling.factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ConfigError(f"{_WHERE}: rope.scaling.factor must be a number above 0, not {factor!r}")
    return None if factor == 1 else LinearRopeScaling(_fp32_as_written(factor))


# --- Llama 3.1's scaling, from its result ----------------------------------------------------------------------------

_TOLERANCE = 1e-5  # of a frequency, relative


def scaling_from_factors(
    config: TextConfig, factors: Tensor, context: int | None = None
) -> RopeScaling | LinearRopeScaling | None:
    """The scaling whose frequencies are the unscaled ones divided by `factors`, [D/2] fp32.

    context: `original_max_position_embeddings` where it is known

    Raises:
        ConfigError: no scaling that is implemented gives these factors.
    """
    plain = rope_frequencies(config.head_dim, config.rope_theta, None).double()
    divisors = factors.double()
    if divisors.shape != plain.shape or not bool(torch.isfinite(divisors).all()) or bool((divisors <= 0).any()):
        raise ConfigError(
            f"rope_freqs.weight must hold {len(plain)} positive numbers; it holds {divisors.tolist()[:4]}…"
            f" ({divisors.numel()})"
        )
    for scaling in _candidates(plain, divisors, context):
        ours = rope_frequencies(config.head_dim, config.rope_theta, scaling).double()
        if bool(((ours * divisors / plain - 1).abs() <= _TOLERANCE).all()):
            return scaling
    raise ConfigError(
        "rope_freqs.weight is not of Llama 3.1's rotary scaling, which is the only one of its kind that is implemented"
    )


def _candidates(
    plain: Tensor, divisors: Tensor, context: int | None
) -> Iterator[RopeScaling | LinearRopeScaling | None]:
    """Scalings that may have given these divisors; plain: the unscaled frequencies, [D/2] fp64."""
    least, most = float(divisors.min()), float(divisors.max())
    factor = _rounded(most)
    if most - least <= _TOLERANCE * most:
        yield None if abs(most - 1) <= _TOLERANCE else LinearRopeScaling(factor)
        return
    defaults = RopeScaling(factor=factor)
    yield defaults
    if context is not None:
        yield replace(defaults, original_max_position_embeddings=context)
    # Between the wavelengths that are kept and those that are stretched, 1 / divisor is a line over the frequency f:
    # 1/d = (1 − b)/factor + b with b = (context · f/2π − low) / (high − low). Its slope and its zero give two of the
    # three numbers; nothing but their ratio enters, so `low` can be the 1 that every released model has.
    between = (divisors > 1 + _TOLERANCE) & (divisors < most * (1 - _TOLERANCE))
    if int(between.sum()) < 2:
        return
    blend = (1 / divisors[between] - 1 / most) / (1 - 1 / most)
    turns = plain[between] / (2 * math.pi)  # a token
    slope = float((blend[0] - blend[-1]) / (turns[0] - turns[-1]))
    zero = float(turns[0]) - float(blend[0]) / slope  # where the blend begins: low / context
    if not (slope > 0 and zero > 0):
        return
    low, context = 1.0, round(1 / zero)
    high = _rounded(low + 1 / (slope * zero))
    yield RopeScaling(factor, low, high, context)


def _rounded(value: float) -> float:
    """Without the noise of fp32: four digits behind the point."""
    return round(value, 4)
