"""Meta's `params.json`: to a `ModelConfig` with the help of the tensors' shapes, and back.

The file carries the text model's width, heads and rotary base, and the tile's size. Everything else that the model
needs is read off the tensors; what they do not show (the vision encoder's heads and taps, token ids) comes from two
optional tables, `vision_model` and `text_model`, or is as in the released models. What the file does carry is checked
against the tensors.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig, RopeScaling, TextConfig, TiledVisionConfig, nearest
from ..errors import CheckpointError, ConfigError
from .mllama import ENCODER, meta_cross_attention_layers

Shapes = Mapping[str, tuple[int, ...]]

_KNOWN = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "use_scaled_rope", "max_batch_size", "max_seq_len", "vision_chunk_size", "vision_max_num_chunks",
    "vision_num_cross_attention_layers", "quantization_args", "lora_args", "vision_model", "text_model",
}  # fmt: skip
_VISION_TABLE = {"num_attention_heads", "intermediate_layers_indices"}
_TEXT_TABLE = {"bos_token_id", "eos_token_ids", "pad_token_id", "max_position_embeddings"}
_DEFAULT_TAPS = (3, 7, 15, 23, 30)


def config_from_meta(raw: Mapping[str, Any], shapes: Shapes) -> ModelConfig:
    """The configuration of a checkpoint in Meta's layout.

    raw: `params.json`; shapes: name → shape of every (merged) tensor

    Raises:
        ConfigError: an unknown key, or a value that does not fit the tensors.
        CheckpointError: a tensor that the sizes are read from is missing.
    """
    _check(raw, _KNOWN, "")
    for key in ("quantization_args", "lora_args"):
        if raw.get(key):
            raise ConfigError(f"{key} is set; only plain floating-point checkpoints are read")
    return ModelConfig(_vision(raw, shapes), text := _text(raw, shapes), image_token_id=text.vocab_size)


def _text(raw: Mapping[str, Any], shapes: Shapes) -> TextConfig:
    rows, dim = _shape(shapes, "text_model.tok_embeddings.weight", 2)
    extra, _ = _shape(shapes, "text_model.learnable_embedding.weight", 2)
    ffn, _ = _shape(shapes, "text_model.layers.0.feed_forward.w1.weight", 2)
    num_self = _count(shapes, "text_model.layers")
    num_cross = _count(shapes, "text_model.cross_attention_layers")
    heads = _number(raw, "n_heads", 32)
    kv_heads = heads if raw.get("n_kv_heads") is None else _number(raw, "n_kv_heads", heads)
    _agree(raw, "dim", dim)
    _agree(raw, "vocab_size", rows)
    _agree(raw, "n_layers", num_self)
    _agree(raw, "vision_num_cross_attention_layers", num_cross)
    if "multiple_of" in raw or raw.get("ffn_dim_multiplier") is not None:
        stated = ffn_size(dim, raw.get("ffn_dim_multiplier"), _number(raw, "multiple_of", 256))
        if stated != ffn:
            raise ConfigError(f"ffn_dim_multiplier and multiple_of give an FFN of {stated}, but the tensors have {ffn}")
    for name, value in (("n_heads", heads), ("n_kv_heads", kv_heads)):
        if value < 1 or dim % heads:
            raise ConfigError(f"{name} is {value}, which does not divide the width {dim}")
    table = _table(raw, "text_model", _TEXT_TABLE)
    given = {**default_tokens(rows), **{k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}}
    if "max_seq_len" in raw:
        given.setdefault("max_position_embeddings", _number(raw, "max_seq_len", 0))
    return TextConfig(
        vocab_size=rows,
        hidden_size=dim,
        intermediate_size=ffn,
        num_hidden_layers=num_self + num_cross,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        cross_attention_layers=meta_cross_attention_layers(num_self, num_cross),
        rope_theta=float(raw.get("rope_theta", 500000.0)),
        rope_scaling=RopeScaling() if raw.get("use_scaled_rope", False) else None,
        rms_norm_eps=float(raw.get("norm_eps", 1e-5)),
        num_extra_embeddings=extra,
        **given,
    )


def _vision(raw: Mapping[str, Any], shapes: Shapes) -> TiledVisionConfig:
    channels = 3
    width, patch_values = _shape(shapes, f"{ENCODER}.conv1._linear.weight", 2)
    tokens, _ = _shape(shapes, f"{ENCODER}.positional_embedding", 2)
    tiles = _shape(shapes, f"{ENCODER}.gated_positional_embedding", 4)[0]
    mlp, _ = _shape(shapes, f"{ENCODER}.transformer.resblocks.0.mlp.c_fc.weight", 2)
    _, features = _shape(shapes, "vision_model.vision_projection.weight", 2)
    patch, side = math.isqrt(patch_values // channels), math.isqrt(max(tokens - 1, 0))
    if patch < 1 or channels * patch**2 != patch_values or side < 1 or side**2 + 1 != tokens:
        raise CheckpointError(f"no square tile has {tokens} tokens of {patch_values} values each")
    if not 1 <= tiles <= 64:
        raise CheckpointError(f"{ENCODER}.gated_positional_embedding has {tiles} rows of tiles; 1 to 64 are read")
    _agree(raw, "vision_chunk_size", side * patch)
    _agree(raw, "vision_max_num_chunks", tiles)
    table = _table(raw, "vision_model", _VISION_TABLE)
    num_layers = _count(shapes, f"{ENCODER}.transformer.resblocks")
    taps = _whole_numbers(table, "intermediate_layers_indices", _DEFAULT_TAPS)
    if width * (1 + len(taps)) != features or max(taps, default=-1) >= num_layers:
        raise ConfigError(
            f"the projector reads {features} features of {num_layers} layers, which does not fit the width {width} once"
            f' and once for each of {list(taps)}; state "vision_model": {{"intermediate_layers_indices": […]}}'
        )
    return TiledVisionConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=num_layers,
        num_global_layers=_count(shapes, f"{ENCODER}.global_transformer.resblocks"),
        num_attention_heads=_number(table, "num_attention_heads", 16),
        num_channels=channels,
        image_size=side * patch,
        patch_size=patch,
        max_num_tiles=tiles,
        intermediate_layers_indices=taps,
    )


def default_tokens(vocab_size: int) -> dict[str, Any]:
    """Token ids where no file states them: Llama 3's for its vocabulary, and none that would stop an answer else."""
    if vocab_size == 128256:
        return {}
    return {"bos_token_id": 0, "eos_token_ids": (), "pad_token_id": 0}


def ffn_size(dim: int, multiplier: float | None, multiple_of: int) -> int:
    """Meta's width of the feed-forward: 8/3 of the model's, scaled, rounded up."""
    size = 8 * dim // 3
    if multiplier is not None:
        size = int(multiplier * size)
    return multiple_of * -(-size // max(multiple_of, 1))


def config_to_meta(config: ModelConfig) -> dict[str, Any]:
    """The `params.json` of a model.

    Raises:
        CheckpointError: a value that Meta's layout has no place for.
    """
    text, vision = config.text, config.tiled
    fixed = {
        "the vision encoder's norm_eps": (vision.norm_eps, 1e-5),
        "num_channels": (vision.num_channels, 3),
        "image_token_id": (config.image_token_id, text.vocab_size),
        "rope_scaling": (text.rope_scaling or RopeScaling(), RopeScaling()),
    }
    for name, (value, needed) in fixed.items():
        if value != needed:
            raise CheckpointError(f"{name} is {value}, and Meta's layout can only hold {needed}")
    multiplier, multiple_of = _ffn_parameters(text.hidden_size, text.intermediate_size)
    params: dict[str, Any] = {
        "dim": text.hidden_size,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple_of,
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads,
        "n_layers": len(text.self_attention_layers),
        "norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "use_scaled_rope": text.rope_scaling is not None,
        "vision_chunk_size": vision.image_size,
        "vision_max_num_chunks": vision.max_num_tiles,
        "vision_num_cross_attention_layers": len(text.cross_attention_layers),
        "vocab_size": text.vocab_size,
    }
    taps = vision.intermediate_layers_indices
    if vision.num_attention_heads != 16 or taps != _DEFAULT_TAPS:
        params["vision_model"] = {
            "num_attention_heads": vision.num_attention_heads,
            "intermediate_layers_indices": list(taps),
        }
    defaults = dataclasses.asdict(TextConfig()) | default_tokens(text.vocab_size)
    stated = {name: getattr(text, name) for name in sorted(_TEXT_TABLE)}
    told = {name: value for name, value in stated.items() if value != defaults[name]}
    if told:
        params["text_model"] = {k: list(v) if isinstance(v, tuple) else v for k, v in told.items()}
    return params


def _ffn_parameters(dim: int, ffn: int) -> tuple[float, int]:
    """A multiplier (as round as can be) and a multiple that give this feed-forward width."""
    multiple_of = math.gcd(ffn, 1024)
    exact = (ffn - multiple_of / 2 + (multiple_of == 1)) / (8 * dim // 3)
    for digits in range(1, 17):
        for number in (ffn / (8 * dim // 3), exact):
            if ffn_size(dim, rounded := round(number, digits), multiple_of) == ffn:
                return rounded, multiple_of
    return exact, multiple_of


# --- helpers ---------------------------------------------------------------------------------------------------------


def _shape(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"the checkpoint lacks {name}, which the sizes are read from; is it Llama 3.2 Vision?")
    if len(shapes[name]) != axes or 0 in shapes[name]:
        raise CheckpointError(f"misshaped {name}: {list(shapes[name])} found, {axes} axes expected")
    return shapes[name]


def _count(shapes: Shapes, prefix: str) -> int:
    """Layers under a prefix: one more than the highest index."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d{1,4})\.")
    return 1 + max((int(match[1]) for name in shapes if (match := pattern.match(name))), default=-1)


def _check(raw: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in raw:
        if key not in known:
            raise ConfigError(f'{where}unknown key "{key}"{nearest(key, known)}')


def _table(raw: Mapping[str, Any], key: str, known: set[str]) -> Mapping[str, Any]:
    table = raw.get(key, {})
    if not isinstance(table, Mapping):
        raise ConfigError(f"{key} must be a table, not {table!r}")
    _check(table, known, f"{key}: ")
    for name in known & table.keys():
        if name in ("intermediate_layers_indices", "eos_token_ids"):
            _whole_numbers(table, name, ())
        else:
            _number(table, name, 0)
    return table


def _number(raw: Mapping[str, Any], key: str, default: int) -> int:
    value = raw.get(key, default)
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ConfigError(f"{key} must be a whole number of at least 0, not {value!r}")
    return value


def _whole_numbers(raw: Mapping[str, Any], key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = raw.get(key, default)
    if not isinstance(value, list | tuple) or any(type(n) is not int or n < 0 for n in value):
        raise ConfigError(f"{key} must be a list of whole numbers, not {value!r}")
    return tuple(value)


def _agree(raw: Mapping[str, Any], key: str, found: int) -> None:
    """Meta's own default of −1 means that the file does not say."""
    if key in raw and raw[key] not in (found, -1):
        raise ConfigError(f"{key} is {raw[key]!r}, but the tensors have {found}")
