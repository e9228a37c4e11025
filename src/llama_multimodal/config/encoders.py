"""The vision transformers of single images: SigLIP, CLIP and DINOv2, and their readers for `config.json`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ..errors import ConfigError, ImageError
from .checks import HF_IGNORED, build, check_keys, expect, nearest, require, section
from .preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Preprocess

Activation = Literal["gelu", "gelu_pytorch_tanh", "quick_gelu"]
"""The exact GELU, its approximation by tanh, and `x · sigmoid(1.702 x)` (Hendrycks and Gimpel 2016)."""


@dataclass(frozen=True)
class VitConfig:
    """What all of them have."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # side of the images whose position table the checkpoint holds, pixels
    patch_size: int = 16
    norm_eps: float = 1e-6
    hidden_act: Activation = "gelu"
    position_mode: Literal["bicubic", "bilinear"] = "bicubic"  # how the table is brought to other sizes
    position_antialias: bool = False
    layer: int | None = None  # hidden state that is returned: 0 enters the blocks, -1 leaves them; None: the final one

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_attention_heads", "num_channels", "patch_size"):
            require(getattr(self, name) > 0, f"{name} must be at least 1", self)
        require(self.image_size >= self.patch_size, "image_size must be at least patch_size", self)
        require(self.hidden_size % self.num_attention_heads == 0, "hidden_size must divide into the heads", self)
        for name, kind in (("hidden_act", Activation), ("position_mode", Literal["bicubic", "bilinear"])):
            value, known = getattr(self, name), get_args(kind)
            require(value in known, f'{name} "{value}" is not implemented; supported: {", ".join(known)}', self)
        states = self.num_hidden_layers + 1
        ok = self.layer is None or -states <= self.layer < states
        require(ok, f"layer must lie between {-states} and {states - 1}, not {self.layer}", self)

    @property
    def side(self) -> int:
        """Rows and columns of the position table. Pixels past the last whole patch are not read."""
        return self.image_size // self.patch_size

    @property
    def num_blocks(self) -> int:
        """Blocks that lie before the hidden state which is returned."""
        return self.num_hidden_layers if self.layer is None else self.layer % (self.num_hidden_layers + 1)

    @property
    def output_size(self) -> int:
        """Width of the features."""
        return self.hidden_size

    @property
    def num_extra_tokens(self) -> int:
        """Tokens of an image that are returned before those of its patches."""
        return 0

    def num_tokens(self, height: int, width: int) -> int:
        """Tokens that an image of this size becomes.

        Raises:
            ImageError: its sides are neither the configuration's nor multiples of the patch.
        """
        rows, columns = self.grid(height, width)
        return self.num_extra_tokens + rows * columns

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of this size.

        Raises:
            ImageError: its sides are neither the configuration's nor multiples of the patch.
        """
        patch, usual = self.patch_size, self.image_size
        if any(side < patch or (side % patch and side != usual) for side in (height, width)):
            raise ImageError(
                f"an image of {height}×{width} pixels does not divide into patches of {patch}; resize it to"
                f" {usual}×{usual} or to multiples of {patch}"
            )
        return height // patch, width // patch


@dataclass(frozen=True)
class SiglipConfig(VitConfig):
    """SigLIP and SigLIP 2 (defaults: base, patch 16, 224). Its tokens are the patches; there is no class token."""

    hidden_act: Activation = "gelu_pytorch_tanh"
    intermediate_size: int = 3072
    pooling_head: bool = True  # attention pooling; language models do without
    channels_last: bool = False  # how a checkpoint holds a patch's weights: row, column, channel (NaFlex)

    def preprocess(self) -> Preprocess:
        """The whole picture, squeezed into a square."""
        return Preprocess(size=(self.image_size, self.image_size), mean=(0.5,) * 3, std=(0.5,) * 3)


@dataclass(frozen=True)
class ClipVisionConfig(VitConfig):
    """CLIP's image encoder (defaults: ViT-B/32). Its final state is not normalised; only the pooled one is."""

    patch_size: int = 32
    norm_eps: float = 1e-5
    hidden_act: Activation = "quick_gelu"
    intermediate_size: int = 3072
    with_class_token: bool = True  # return it before the patches

    @property
    def num_extra_tokens(self) -> int:
        return int(self.with_class_token)

    def preprocess(self) -> Preprocess:
        """The middle square of the picture."""
        side = self.image_size
        return Preprocess(shortest_edge=side, crop=(side, side), mean=CLIP_MEAN, std=CLIP_STD)


@dataclass(frozen=True)
class Dinov2Config(VitConfig):
    """DINOv2, with or without registers (defaults: ViT-B/14 without). Tokens: class, registers, patches."""

    patch_size: int = 14
    mlp_ratio: float = 4
    swiglu: bool = False  # a gated feed-forward block, as the giant has
    qkv_bias: bool = True
    num_register_tokens: int = 0
    with_class_token: bool = True  # return it
    with_registers: bool = True  # return them

    @property
    def intermediate_size(self) -> int:
        """Width of the feed-forward block. The gated one has three products, so two thirds of the width, in eights."""
        plain = int(self.hidden_size * self.mlp_ratio)
        return (int(plain * 2 / 3) + 7) // 8 * 8 if self.swiglu else plain

    @property
    def num_extra_tokens(self) -> int:
        return int(self.with_class_token) + self.with_registers * self.num_register_tokens

    def preprocess(self) -> Preprocess:
        """The middle square of the picture, at the size of the position table."""
        side = self.image_size
        return Preprocess(shortest_edge=side, crop=(side, side), mean=IMAGENET_MEAN, std=IMAGENET_STD)


EncoderConfig = SiglipConfig | ClipVisionConfig | Dinov2Config


# --- config.json of transformers -------------------------------------------------------------------------------------

_NAMES = {  # theirs → ours, where all have them
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_channels": "num_channels",
    "patch_size": "patch_size",
    "image_size": "image_size",
    "layer_norm_eps": "norm_eps",
    "hidden_act": "hidden_act",
}
_IGNORED = {
    *HF_IGNORED, "_attn_implementation_autoset", "gradient_checkpointing", "initializer_factor",
    "logit_scale_init_value", "projection_dim", "transformers.js_config",
}  # fmt: skip
_DINOV2_IGNORED = {
    "_out_features", "_out_indices", "apply_layernorm", "attention_probs_dropout_prob", "drop_path_rate",
    "hidden_dropout_prob", "layerscale_value", "out_features", "out_indices", "reshape_hidden_states", "stage_names",
    "use_mask_token",
}  # fmt: skip


def encoder_from_hf(raw: Mapping[str, Any], where: str = "config.json", *, layer: int | None = None) -> EncoderConfig:
    """`config.json` of a SigLIP, CLIP or DINOv2 checkpoint, of the whole model or of its vision part, by `model_type`.

    where: what errors call the table. layer: the hidden state that the encoder returns

    Raises:
        ConfigError: another `model_type`, an unknown key, or a value this project does not implement.
    """
    config = _reader(raw, where)(raw, where)
    try:
        return replace(config, layer=layer)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def siglip_from_hf(raw: Mapping[str, Any], where: str = "config.json") -> SiglipConfig:
    """`config.json` of a SigLIP checkpoint, or the `vision_config` in it.

    A `model_type` of siglip2 is the layout of the variable resolution (NaFlex): a checkpoint of SigLIP 2 for one
    resolution calls itself siglip.

    Raises:
        ConfigError: an unknown key, or a value this project does not implement.
    """
    raw, where = _vision_part(raw, siglip_from_hf, where)
    names = {**_NAMES, "intermediate_size": "intermediate_size", "vision_use_head": "pooling_head"}
    given, known = _given(raw, names), {*names, *_IGNORED}
    if raw.get("model_type") == "siglip2_vision_model":
        known.add("num_patches")
        patches, patch = raw.get("num_patches", 256), given.get("patch_size", SiglipConfig.patch_size)
        side = int(patches**0.5) if isinstance(patches, int) and patches > 0 else 0
        if side * side != patches or not isinstance(patch, int):
            raise ConfigError(f"{where}: num_patches must be a square, not {patches!r}")
        # The checkpoint has no image size: its table is for a square of so many patches.
        given |= {"image_size": side * patch, "channels_last": True}
        given |= {"position_mode": "bilinear", "position_antialias": True}
    check_keys(raw, known, where)
    return build(SiglipConfig, given, where)


def clip_from_hf(raw: Mapping[str, Any], where: str = "config.json") -> ClipVisionConfig:
    """`config.json` of a CLIP checkpoint, or the `vision_config` in it.

    Raises:
        ConfigError: an unknown key, or a value this project does not implement.
    """
    raw, where = _vision_part(raw, clip_from_hf, where)
    names = {**_NAMES, "intermediate_size": "intermediate_size"}
    check_keys(raw, {*names, *_IGNORED}, where)
    return build(ClipVisionConfig, _given(raw, names), where)


def dinov2_from_hf(raw: Mapping[str, Any], where: str = "config.json") -> Dinov2Config:
    """`config.json` of a DINOv2 checkpoint, with or without registers.

    Raises:
        ConfigError: an unknown key, or a value this project does not implement.
    """
    raw, where = _vision_part(raw, dinov2_from_hf, where)
    names = {**_NAMES, "mlp_ratio": "mlp_ratio", "qkv_bias": "qkv_bias", "use_swiglu_ffn": "swiglu"}
    defaults: dict[str, Any] = {}
    if raw.get("model_type") == "dinov2_with_registers":
        names["num_register_tokens"] = "num_register_tokens"
        # transformers' defaults where the file is silent; with registers it also resizes positions in another way.
        defaults = {"num_register_tokens": 4, "patch_size": 16, "position_antialias": True}
    check_keys(raw, {*names, "head_dim", *_DINOV2_IGNORED, *_IGNORED}, where)
    config: Dinov2Config = build(Dinov2Config, defaults | _given(raw, names), where)
    expect(raw, "head_dim", config.hidden_size // config.num_attention_heads, where)
    return config


_Reader = Callable[[Mapping[str, Any], str], EncoderConfig]
_READERS: dict[str, _Reader] = {
    "siglip": siglip_from_hf,
    "siglip_vision_model": siglip_from_hf,
    "siglip2": siglip_from_hf,
    "siglip2_vision_model": siglip_from_hf,
    "clip": clip_from_hf,
    "clip_vision_model": clip_from_hf,
    "dinov2": dinov2_from_hf,
    "dinov2_with_registers": dinov2_from_hf,
}
_WHOLE = {"siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model", "clip": "clip_vision_model"}
"""Models with a text tower → what their `vision_config` is."""


def _reader(raw: Mapping[str, Any], where: str) -> _Reader:
    kind = raw.get("model_type")
    if kind not in _READERS:
        hint = nearest(str(kind), _READERS)
        raise ConfigError(f'{where}: model_type "{kind}" is no encoder; supported: {", ".join(_READERS)}{hint}')
    return _READERS[str(kind)]


def _vision_part(raw: Mapping[str, Any], reader: _Reader, where: str) -> tuple[Mapping[str, Any], str]:
    """The table of the vision part, with its `model_type`, and what to call it in errors."""
    kind = str(raw.get("model_type"))
    if _reader(raw, where) is not reader:
        family = [name for name, other in _READERS.items() if other is reader]
        raise ConfigError(f'{where}: model_type is "{kind}"; {", ".join(family)} was expected')
    if kind not in _WHOLE:
        return raw, where
    tables = {"vision_config", "text_config", "vision_config_dict", "text_config_dict"}
    check_keys(raw, {*tables, *_IGNORED}, where)
    # Where CLIP's first files hold the table twice, transformers takes this one.
    name = "vision_config_dict" if raw.get("vision_config_dict") is not None else "vision_config"
    vision = section(raw, name)
    expect(vision, "model_type", _WHOLE[kind], f"{where}: {name}")
    return {**vision, "model_type": _WHOLE[kind]}, f"{where}: {name}"


def encoder_to_hf(config: EncoderConfig) -> dict[str, Any]:
    """The table of transformers for an encoder alone."""
    table = {theirs: getattr(config, ours) for theirs, ours in _NAMES.items()}
    if isinstance(config, Dinov2Config):
        table |= {"mlp_ratio": config.mlp_ratio, "qkv_bias": config.qkv_bias, "use_swiglu_ffn": config.swiglu}
        if not config.num_register_tokens:
            return {"model_type": "dinov2", **table, "use_mask_token": False}  # which only training needs
        return {"model_type": "dinov2_with_registers", **table, "num_register_tokens": config.num_register_tokens}
    table["intermediate_size"] = config.intermediate_size
    if isinstance(config, ClipVisionConfig):
        return {"model_type": "clip_vision_model", **table}
    table["vision_use_head"] = config.pooling_head
    if not config.channels_last:
        return {"model_type": "siglip_vision_model", **table}
    del table["image_size"]
    return {"model_type": "siglip2_vision_model", **table, "num_patches": config.side**2}


def _given(raw: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The values that a table has, by our names. A size may stand there twice, for the height and for the width."""
    given = {ours: raw[theirs] for theirs, ours in names.items() if raw.get(theirs) is not None}
    for name in ("image_size", "patch_size"):
        value = given.get(name)
        if isinstance(value, Iterable) and not isinstance(value, str):
            sides = list(value)
            if len(sides) != 2 or sides[0] != sides[1]:
                raise ConfigError(f"config.json: {name} is {sides}; only squares are read")
            given[name] = sides[0]
    for name in given.keys() & {"pooling_head", "qkv_bias", "swiglu"}:
        if not isinstance(given[name], bool):
            raise ConfigError(f"config.json: {name} must be true or false, not {given[name]!r}")
    return given
