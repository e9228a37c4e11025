"""Model configurations: frozen dataclasses, and their readers for Hugging Face and Meta files.

Every key of a file is either understood, or on the list of keys that do not change the numbers, or an error that
names the nearest known key. Nothing is dropped silently.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError


def _require(condition: bool, message: str, config: Any) -> None:
    if not condition:
        raise ConfigError(f"{type(config).__name__}: {message}")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (`rope_type: llama3`)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class TiledVisionConfig:
    """The tiled vision encoder of Llama 3.2 Vision (defaults: 11B Instruct)."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_global_layers: int = 8
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 560  # side of one tile, pixels
    patch_size: int = 14
    max_num_tiles: int = 4
    intermediate_layers_indices: tuple[int, ...] = (3, 7, 15, 23, 30)
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _require(self.image_size % self.patch_size == 0, "image_size must be a multiple of patch_size", self)
        _require(self.hidden_size % self.num_attention_heads == 0, "hidden_size must divide into the heads", self)
        taps = self.intermediate_layers_indices
        _require(list(taps) == sorted(set(taps)), "intermediate_layers_indices must ascend", self)
        _require(all(0 <= i < self.num_hidden_layers for i in taps), "intermediate_layers_indices out of range", self)

    @property
    def num_patches(self) -> int:
        """Tokens of one tile: its patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def output_size(self) -> int:
        """Width of the features handed to the projector: the final state and every tap."""
        return self.hidden_size * (1 + len(self.intermediate_layers_indices))

    @property
    def aspect_ratios(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of aspect-ratio ids 1, 2, …: every grid of at most `max_num_tiles` tiles."""
        n = self.max_num_tiles
        return tuple((h, w) for h in range(1, n + 1) for w in range(1, n + 1) if h * w <= n)


@dataclass(frozen=True)
class TextConfig:
    """The Llama decoder (defaults: 11B). `num_hidden_layers` counts self- and cross-attention blocks together."""

    vocab_size: int = 128256
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    cross_attention_layers: tuple[int, ...] = (3, 8, 13, 18, 23, 28, 33, 38)
    max_position_embeddings: int = 131072
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = RopeScaling()
    rms_norm_eps: float = 1e-5
    num_extra_embeddings: int = 8  # rows of the embedding past the vocabulary; the first is `<|image|>`
    bos_token_id: int = 128000
    eos_token_ids: tuple[int, ...] = (128001, 128008, 128009)
    pad_token_id: int = 128004

    def __post_init__(self) -> None:
        _require(self.hidden_size % self.num_attention_heads == 0, "hidden_size must divide into the heads", self)
        _require(self.num_attention_heads % self.num_key_value_heads == 0, "query heads must divide by kv heads", self)
        cross = self.cross_attention_layers
        _require(list(cross) == sorted(set(cross)), "cross_attention_layers must ascend", self)
        _require(all(0 <= i < self.num_hidden_layers for i in cross), "cross_attention_layers out of range", self)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def self_attention_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_hidden_layers) if i not in self.cross_attention_layers)


@dataclass(frozen=True)
class ModelConfig:
    """A vision-language model: vision encoder → projector → decoder with gated cross-attention."""

    vision: TiledVisionConfig = TiledVisionConfig()
    text: TextConfig = TextConfig()
    image_token_id: int = 128256

    def __post_init__(self) -> None:
        rows = self.text.vocab_size + self.text.num_extra_embeddings
        _require(0 <= self.image_token_id < rows, f"image_token_id must be under {rows}, the embedding's rows", self)


LLAMA_3_2_11B_VISION = ModelConfig()
LLAMA_3_2_90B_VISION = ModelConfig(
    text=TextConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=100,
        num_attention_heads=64,
        cross_attention_layers=tuple(range(3, 100, 5)),
    )
)


# --- Hugging Face: config.json of model_type "mllama" ----------------------------------------------------------------

# Keys that say nothing about the arithmetic, or that only restate it.
_HF_IGNORED = {
    "_name_or_path", "add_cross_attention", "architectures", "attention_dropout", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dropout", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range", "is_decoder",
    "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length", "model_type",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token_id", "prefix", "problem_type", "pruned_heads",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_bfloat16", "use_cache",
}  # fmt: skip


def config_from_hf(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """`config.json` (and `generation_config.json`, whose stop tokens win) of an mllama checkpoint.

    Raises:
        ConfigError: another `model_type`, an unknown key, a missing key, or a value this project does not implement.
    """
    if raw.get("model_type") != "mllama":
        raise ConfigError(f'config.json has model_type "{raw.get("model_type")}"; supported: mllama')
    _check_keys(raw, {"vision_config", "text_config", "image_token_index", *_HF_IGNORED}, "config.json")
    vision, text = _section(raw, "vision_config"), _section(raw, "text_config")
    return ModelConfig(
        vision=_vision_from_hf(vision),
        text=_text_from_hf(text, generation or {}),
        image_token_id=int(raw.get("image_token_index", 128256)),
    )


def _vision_from_hf(raw: Mapping[str, Any]) -> TiledVisionConfig:
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
    _check_keys(raw, {*known, "hidden_act", "vision_output_dim", "supported_aspect_ratios", *_HF_IGNORED}, where)
    _expect(raw, "hidden_act", "gelu", where)
    given = {ours: raw[theirs] for theirs, ours in names.items() if theirs in raw}
    if heads in raw:
        given["num_attention_heads"] = raw[heads]
    if "intermediate_layers_indices" in raw:
        given["intermediate_layers_indices"] = tuple(raw["intermediate_layers_indices"])
    config = _build(TiledVisionConfig, given, where)
    _expect(raw, "vision_output_dim", config.output_size, where)
    if "supported_aspect_ratios" in raw:
        stated = tuple(tuple(pair) for pair in raw["supported_aspect_ratios"])
        if stated != config.aspect_ratios:
            raise ConfigError(f"{where}: supported_aspect_ratios is not the list for {config.max_num_tiles} tiles")
    return config


def _text_from_hf(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> TextConfig:
    where = "config.json: text_config"
    names = {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
    }  # fmt: skip
    known = {*names, "rope_theta", "rope_scaling", "rope_parameters", "cross_attention_layers", "hidden_act"}
    _check_keys(raw, {*known, *_HF_IGNORED}, where)
    _expect(raw, "hidden_act", "silu", where)
    _expect(raw, "tie_word_embeddings", False, where)
    given = {name: raw[name] for name in names if name in raw}
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
    return _build(TextConfig, given, where)


def rope_scaling_from_hf(raw: Mapping[str, Any], where: str) -> RopeScaling | None:
    """The `rope_scaling` / `rope_parameters` table of a config; None for the unscaled rotary embedding."""
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigError(f'{where}: rope type "{kind}" is not implemented; supported: default, llama3')
    known = {field.name for field in dataclasses.fields(RopeScaling)}
    _check_keys(raw, {*known, "rope_type", "type"}, f"{where}: rope_scaling")
    return _build(RopeScaling, {k: v for k, v in raw.items() if k in known}, where)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads for this model."""
    text = {
        key: value for key, value in dataclasses.asdict(config.text).items()
        if key not in {"num_extra_embeddings", "eos_token_ids", "rope_scaling", "cross_attention_layers"}
    }  # fmt: skip
    text["cross_attention_layers"] = list(config.text.cross_attention_layers)
    text["eos_token_id"] = list(config.text.eos_token_ids)
    text["hidden_act"] = "silu"
    text["tie_word_embeddings"] = False
    scaling = config.text.rope_scaling
    text["rope_scaling"] = {"rope_type": "llama3", **dataclasses.asdict(scaling)} if scaling else None
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


# --- helpers ---------------------------------------------------------------------------------------------------------


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = raw.get(key)
    if not isinstance(section, Mapping):
        raise ConfigError(f"config.json: {key} is missing or not a table")
    return section


def _check_keys(raw: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = set(known)
    for key in raw:
        if key not in known:
            raise ConfigError(f'{where}: unknown key "{key}"{nearest(key, known)}')


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean "…"?` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(str(word), sorted(known), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def from_dict(cls: type[Any], raw: Mapping[str, Any], where: str) -> Any:
    """A config dataclass from a table of its own field names; lists become tuples.

    Raises:
        ConfigError: an unknown key or a value of the wrong type.
    """
    _check_keys(raw, {field.name for field in dataclasses.fields(cls)}, where)
    return _build(cls, {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}, where)


def _expect(raw: Mapping[str, Any], key: str, value: Any, where: str) -> None:
    if key in raw and raw[key] is not None and raw[key] != value:
        raise ConfigError(f"{where}: {key} is {raw[key]!r}; this model needs {value!r}")


def _build(cls: type[Any], given: Mapping[str, Any], where: str) -> Any:
    """Construct a config after checking that numbers are numbers; `field.type` is the annotation as written."""
    for field in dataclasses.fields(cls):
        if field.name not in given or field.type not in ("int", "float"):
            continue
        value = given[field.name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{where}: {field.name} must be a number, not {value!r}")
        if field.type == "int" and (not isinstance(value, int) or value < 0):
            raise ConfigError(f"{where}: {field.name} must be a whole number of at least 0, not {value!r}")
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error
