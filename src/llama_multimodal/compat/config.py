"""The original's configurations: tables of its own keys, and what the library makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..assemble import usual_cross_attention_layers
from ..config import MLPProjector, ModelConfig, SiglipConfig, TextConfig, nearest, siglip_from_hf
from ..config.assembled import ASSEMBLED
from ..config.checks import build, check_keys
from ..errors import ConfigError

_TEXT = {  # theirs → ours
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_ids",
    "pad_token_id": "pad_token_id",
    "tie_word_embeddings": "tie_word_embeddings",
}
_LAYERS = 32  # self-attention blocks where a table has no `n_layers`
_MUTABLE = "use_cuda_kernels"


def SiglipVisionConfig(**keys: Any) -> SiglipConfig:
    """A SigLIP encoder's configuration, for `MLLAMAConfig`; without keys it is the base model (patch 16, 224 pixels).

    keys: hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_channels, image_size, patch_size,
        and what else transformers' class of that name has

    Raises:
        ConfigError: an unknown key, or a value that does not fit.
    """
    table = {"model_type": "siglip_vision_model", "vision_use_head": False, **keys}
    return siglip_from_hf(table, "vision_config")


def text_config_of(given: Mapping[str, Any] | TextConfig | MLLAMAConfig) -> TextConfig:
    """The decoder's configuration from the original's table (or ours), for text alone: no gated blocks, no extra rows.

    Without `eos_token_id` and its like, a decoder of Llama 3's vocabulary has Llama 3's; another never ends an answer
    by itself.

    Raises:
        ConfigError: an unknown key, or a value that does not fit.
    """
    if isinstance(given, MLLAMAConfig):
        return given.text_config
    if isinstance(given, TextConfig):
        if given.cross_attention_layers or given.num_extra_embeddings:
            raise ConfigError("text_config: cross-attention layers and the image's row are added by MLLAMAConfig")
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(f"text_config must be a table of keys such as n_layers, not {given!r}")
    for theirs, ours in _TEXT.items():
        if ours in given and ours not in _TEXT:
            raise ConfigError(f'text_config: "{ours}" is called "{theirs}" here')
    check_keys(given, _TEXT, "text_config")
    values = {_TEXT[key]: value for key, value in given.items()}
    end = values.get("eos_token_ids", ())
    if "eos_token_ids" in values:
        values["eos_token_ids"] = (end,) if isinstance(end, int) else tuple(end)
    usual = TextConfig()
    others = values.get("vocab_size", usual.vocab_size) != usual.vocab_size
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_ids": (), "pad_token_id": 0} if others else {}
    own = {"num_hidden_layers": _LAYERS, "cross_attention_layers": (), "rope_scaling": None, "num_extra_embeddings": 0}
    config: TextConfig = build(TextConfig, {**ids, **own, **values}, "text_config")
    named = (config.bos_token_id, config.pad_token_id, *config.eos_token_ids)
    if not all(0 <= token < config.vocab_size for token in named):
        raise ConfigError(f"text_config: the ids {named} of special tokens must be under vocab_size")
    return config


class MLLAMAConfig:
    """A SigLIP encoder, a projector, and a Llama decoder that reads it through gated cross-attention.

    Only `use_cuda_kernels` can be set afterwards.

    Attributes:
        vision_config: the encoder's
        text_config: the decoder's, whose layers are counted as in the original: without the gated blocks
        projection_dim, image2text_projection_bias: as given
        model: the library's configuration of the whole, with a gated block behind the first three and then every four
            blocks, as in Llama 3.2 Vision; `models.build_model(config.model)` builds it
        use_cuda_kernels: False runs models of this configuration on a GPU in plain torch
    """

    vision_config: SiglipConfig
    text_config: TextConfig
    projection_dim: int
    image2text_projection_bias: bool
    model: ModelConfig
    use_cuda_kernels: bool

    def __init__(
        self,
        vision_config: Mapping[str, Any] | SiglipConfig,
        text_config: Mapping[str, Any] | TextConfig,
        projection_dim: int,
        image2text_projection_bias: bool = True,
        *,
        image_token_id: int | None = None,
        use_cuda_kernels: bool = True,
    ) -> None:
        """projection_dim: width between the projector's two linear layers, which have a GELU between them
        image_token_id: `MllamaImageProcessor.image_token_id`; None is the first id past the vocabulary, where a
            tokenizer of the whole vocabulary puts it

        Raises:
            ConfigError: an unknown key, or values that do not fit each other.
        """
        if isinstance(vision_config, Mapping):
            vision_config = SiglipVisionConfig(**vision_config)
        if not isinstance(vision_config, SiglipConfig):
            raise ConfigError(f"vision_config must be a table or a SiglipVisionConfig, not {vision_config!r}")
        text = text_config_of(text_config)
        if isinstance(projection_dim, bool) or not isinstance(projection_dim, int):
            raise ConfigError(f"projection_dim must be a whole number, not {projection_dim!r}")
        token = text.vocab_size if image_token_id is None else image_token_id
        if not 0 <= token <= text.vocab_size:
            most = f"at most {text.vocab_size}, the first id past vocab_size"
            raise ConfigError(f"image_token_id is {token}; it must be {most}: make vocab_size the tokenizer's")
        vision = replace(vision_config, pooling_head=False)
        layers = usual_cross_attention_layers(text.num_hidden_layers)
        model = ModelConfig(
            vision=vision,
            text=replace(
                text,
                num_hidden_layers=text.num_hidden_layers + len(layers),
                cross_attention_layers=layers,
                num_extra_embeddings=int(token == text.vocab_size),
            ),
            image_token_id=token,
            projector=MLPProjector(bias=bool(image2text_projection_bias), hidden_size=projection_dim),
            model_type=ASSEMBLED,
        )
        self.__dict__.update(
            vision_config=vision,
            text_config=text,
            projection_dim=projection_dim,
            image2text_projection_bias=bool(image2text_projection_bias),
            model=model,
            use_cuda_kernels=bool(use_cuda_kernels),
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name != _MUTABLE:
            raise ConfigError(f'"{name}" cannot be set; make another MLLAMAConfig{nearest(name, [_MUTABLE])}')
        super().__setattr__(name, bool(value))

    def __repr__(self) -> str:
        return f"MLLAMAConfig(use_cuda_kernels={self.use_cuda_kernels}, model={self.model})"
