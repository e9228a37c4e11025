"""Models in plain PyTorch. They hold weights and arithmetic, no state and no files."""

from .clip import ClipVisionEncoder
from .dinov2 import Dinov2Encoder
from .parts import build_encoder, register_encoder, register_projector
from .siglip import SiglipEncoder
from .vit import ImageEncoder
from .vlm import LanguageModel, ModelOutput, VisionLanguageModel, build_model

__all__ = [
    "ClipVisionEncoder",
    "Dinov2Encoder",
    "ImageEncoder",
    "LanguageModel",
    "ModelOutput",
    "SiglipEncoder",
    "VisionLanguageModel",
    "build_encoder",
    "build_model",
    "register_encoder",
    "register_projector",
]
