"""Model configurations: frozen dataclasses, and their readers for the files of others."""

from .checks import from_dict, nearest
from .hf import config_from_hf, config_to_hf
from .model import LLAMA_3_2_11B_VISION, LLAMA_3_2_90B_VISION, ModelConfig
from .text import RopeScaling, TextConfig
from .vision import TiledVisionConfig

__all__ = [
    "LLAMA_3_2_11B_VISION",
    "LLAMA_3_2_90B_VISION",
    "ModelConfig",
    "RopeScaling",
    "TextConfig",
    "TiledVisionConfig",
    "config_from_hf",
    "config_to_hf",
    "from_dict",
    "nearest",
]
