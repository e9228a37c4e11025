"""A whole model's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from .checks import require
from .text import TextConfig
from .vision import TiledVisionConfig


@dataclass(frozen=True)
class LanguageModelConfig:
    """A decoder alone, for text."""

    text: TextConfig

    def __post_init__(self) -> None:
        require(not self.text.cross_attention_layers, "cross-attention layers need a vision encoder", self)

    @property
    def image_token_id(self) -> None:
        """No token stands for an image."""


@dataclass(frozen=True)
class ModelConfig:
    """A vision-language model: vision encoder → projector → decoder with gated cross-attention."""

    vision: TiledVisionConfig = field(default_factory=TiledVisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_token_id: int = 128256

    def __post_init__(self) -> None:
        rows = self.text.vocab_size + self.text.num_extra_embeddings
        require(0 <= self.image_token_id < rows, f"image_token_id must be under {rows}, the embedding's rows", self)


AnyModelConfig = ModelConfig | LanguageModelConfig

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
