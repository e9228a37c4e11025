"""Model configurations: frozen dataclasses, and their readers for the files of others."""

from .checks import from_dict, nearest
from .encoders import (
    Activation,
    ClipVisionConfig,
    Dinov2Config,
    EncoderConfig,
    SiglipConfig,
    VitConfig,
    clip_from_hf,
    dinov2_from_hf,
    encoder_from_hf,
    siglip_from_hf,
)
from .hf import config_from_hf, config_to_hf
from .model import (
    LLAMA_3_2_11B_VISION,
    LLAMA_3_2_90B_VISION,
    AnyModelConfig,
    Fusion,
    LanguageModelConfig,
    ModelConfig,
)
from .packing import CROSS_ATTENTION, spared
from .parts import PROJECTORS, VISION, ProjectorConfig, VisionConfig, add_part
from .preprocess import Preprocess, preprocess_from_hf, preprocess_to_hf
from .projectors import IdentityProjector, LinearProjector, MLPProjector, PixelShuffleProjector
from .text import LinearRopeScaling, RopeScaling, TextConfig
from .vision import TiledVisionConfig

__all__ = [
    "CROSS_ATTENTION",
    "LLAMA_3_2_11B_VISION",
    "LLAMA_3_2_90B_VISION",
    "PROJECTORS",
    "VISION",
    "Activation",
    "AnyModelConfig",
    "ClipVisionConfig",
    "Dinov2Config",
    "EncoderConfig",
    "Fusion",
    "IdentityProjector",
    "LanguageModelConfig",
    "LinearProjector",
    "LinearRopeScaling",
    "MLPProjector",
    "ModelConfig",
    "PixelShuffleProjector",
    "Preprocess",
    "ProjectorConfig",
    "RopeScaling",
    "SiglipConfig",
    "TextConfig",
    "TiledVisionConfig",
    "VisionConfig",
    "VitConfig",
    "add_part",
    "clip_from_hf",
    "config_from_hf",
    "config_to_hf",
    "dinov2_from_hf",
    "encoder_from_hf",
    "from_dict",
    "nearest",
    "preprocess_from_hf",
    "preprocess_to_hf",
    "siglip_from_hf",
    "spared",
]
