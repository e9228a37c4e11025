"""A whole model's configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from ..errors import ConfigError, ImageError
from .checks import require
from .parts import ProjectorConfig, VisionConfig
from .preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from .projectors import LinearProjector, PixelShuffleProjector
from .text import TextConfig
from .vision import TiledVisionConfig

Fusion = Literal["cross_attention", "splice"]
"""How a decoder reads an image: gated blocks attend to it, or its features take the place of placeholder tokens."""


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
    """A vision-language model: vision encoder → projector → decoder."""

    vision: TiledVisionConfig | VisionConfig = field(default_factory=TiledVisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_token_id: int = 128256
    projector: ProjectorConfig = field(default_factory=LinearProjector)
    fusion: Fusion = "cross_attention"
    # LLaVA-NeXT: (height, width) of the canvases. Crops are joined without their padding, a learned newline ends rows.
    grid_pinpoints: tuple[tuple[int, int], ...] = ()
    model_type: str = "mllama"  # how its files are written; "llama_multimodal" holds every combination

    def __post_init__(self) -> None:
        rows = self.text.vocab_size + self.text.num_extra_embeddings
        require(0 <= self.image_token_id < rows, f"image_token_id must be under {rows}, the embedding's rows", self)
        known = get_args(Fusion)
        require(self.fusion in known, f'fusion "{self.fusion}" is not one of {", ".join(known)}', self)
        spliced, layers = self.fusion == "splice", self.text.cross_attention_layers
        require(not (spliced and layers), "splice fusion has no cross-attention layers", self)
        require(spliced or not self.grid_pinpoints, "grid_pinpoints need splice fusion", self)
        side = self.vision.image_size
        tokens = self.vision.num_tokens(side, side)
        self.projector.check(self.vision.output_size, self.text.hidden_size, tokens)
        square = math.isqrt(tokens) ** 2 == tokens
        require(square or not self.grid_pinpoints, "grid_pinpoints need patches alone, and no class token", self)

    @property
    def tiled(self) -> TiledVisionConfig:
        """The vision configuration of a model whose encoder reads tiles, as Llama 3.2 Vision's does.

        Raises:
            ConfigError: it has another encoder.
        """
        if not isinstance(self.vision, TiledVisionConfig):
            raise ConfigError(f"this needs a tiled encoder, and the model has a {type(self.vision).__name__}")
        return self.vision

    def preprocess(self) -> Preprocess:
        """How a picture becomes pixels where a checkpoint has no `preprocessor_config.json`."""
        if isinstance(self.vision, TiledVisionConfig):  # its tiles follow from its configuration alone
            return Preprocess(mean=CLIP_MEAN, std=CLIP_STD)
        usual, side = self.vision.preprocess(), self.vision.image_size
        if self.grid_pinpoints:
            return replace(usual, layout="anyres", tile_size=side, grid_pinpoints=self.grid_pinpoints)
        if self.model_type in ("idefics3", "smolvlm"):
            return replace(usual, layout="split", size=None, longest_edge=4 * side, tile_size=side, resample=1)
        return usual

    def num_tokens(self, height: int, width: int) -> int:
        """Tokens that the decoder reads of one picture, crop or tile of this size.

        Raises:
            ImageError: the encoder or the projector does not take this size.
        """
        if height != width and isinstance(self.projector, PixelShuffleProjector):
            raise ImageError(
                f"a picture of {height}×{width} pixels is no square, and pixel_shuffle joins the patches of squares;"
                " prepare pictures as squares, or take a linear or mlp projector"
            )
        return self.projector.num_tokens(self.vision.num_tokens(height, width))


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
