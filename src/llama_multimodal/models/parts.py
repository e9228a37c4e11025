"""Which module stands for which part's configuration. Others may add encoders and projectors of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..config import (
    PROJECTORS,
    VISION,
    ClipVisionConfig,
    Dinov2Config,
    EncoderConfig,
    IdentityProjector,
    LinearProjector,
    MLPProjector,
    PixelShuffleProjector,
    SiglipConfig,
    TiledVisionConfig,
    add_part,
)
from . import projectors
from .clip import ClipVisionEncoder
from .dinov2 import Dinov2Encoder
from .mllama_vision import TiledVisionEncoder
from .siglip import SiglipEncoder
from .vit import ImageEncoder

_ENCODERS: dict[type[Any], Callable[[Any], nn.Module]] = {
    TiledVisionConfig: TiledVisionEncoder,
    SiglipConfig: SiglipEncoder,
    ClipVisionConfig: ClipVisionEncoder,
    Dinov2Config: Dinov2Encoder,
}
_PROJECTORS: dict[type[Any], Callable[[Any, int, int], nn.Module]] = {
    LinearProjector: projectors.linear,
    MLPProjector: projectors.MLP,
    PixelShuffleProjector: projectors.PixelShuffle,
    IdentityProjector: projectors.identity,
}


def register_encoder(name: str, config: type[Any], module: Callable[[Any], nn.Module]) -> None:
    """Add a vision encoder under a name, for `from_parts(vision=…)` and for the files of models that have it.

    config: a frozen dataclass with what `config.VisionConfig` lists, of plain values
    module: of a configuration; its call takes pixels [N, 3, H, W] to features [N, tokens, output size]

    Raises:
        ConfigError: the name is another's, or the configuration is no frozen dataclass.
    """
    add_part(VISION, name, config)
    _ENCODERS[config] = module


def register_projector(name: str, config: type[Any], module: Callable[[Any, int, int], nn.Module]) -> None:
    """Add a projector under a name, for `from_parts(projector=…)` and for the files of models that have it.

    config: a frozen dataclass with what `config.ProjectorConfig` lists, of plain values
    module: of a configuration, the encoder's width and the decoder's; its call takes features [N, tokens, encoder's
        width] to [N, fewer or as many tokens, decoder's width]

    Raises:
        ConfigError: the name is another's, or the configuration is no frozen dataclass.
    """
    add_part(PROJECTORS, name, config)
    _PROJECTORS[config] = module


def build_encoder(config: EncoderConfig) -> ImageEncoder:
    """A SigLIP, CLIP or DINOv2 encoder with random weights."""
    encoder = build_vision(config)
    assert isinstance(encoder, ImageEncoder)
    return encoder


def build_vision(config: Any) -> nn.Module:
    """The vision encoder of a configuration, with random weights."""
    return _ENCODERS[type(config)](config)


def build_projector(config: Any, vision_size: int, text_size: int) -> nn.Module:
    """The projector of a configuration between an encoder and a decoder of these widths, with random weights."""
    return _PROJECTORS[type(config)](config, vision_size, text_size)
