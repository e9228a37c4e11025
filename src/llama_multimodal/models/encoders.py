"""The vision transformer that a configuration describes."""

from __future__ import annotations

from ..config import ClipVisionConfig, EncoderConfig, SiglipConfig
from .clip import ClipVisionEncoder
from .dinov2 import Dinov2Encoder
from .siglip import SiglipEncoder
from .vit import ImageEncoder


def build_encoder(config: EncoderConfig) -> ImageEncoder:
    """A SigLIP, CLIP or DINOv2 encoder with random weights."""
    if isinstance(config, SiglipConfig):
        return SiglipEncoder(config)
    return ClipVisionEncoder(config) if isinstance(config, ClipVisionConfig) else Dinov2Encoder(config)
