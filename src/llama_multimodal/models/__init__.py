"""Models in plain PyTorch. They hold weights and arithmetic, no state and no files."""

from .vlm import ModelOutput, VisionLanguageModel

__all__ = ["ModelOutput", "VisionLanguageModel"]
