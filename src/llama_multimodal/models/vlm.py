"""The whole models: a decoder alone, and encoder → projector → decoder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import CrossAttentionCache, ReadImages, SelfAttentionCache, SplicedImages
from ..config import AnyModelConfig, LanguageModelConfig, ModelConfig
from ..errors import PromptError
from ..inputs import ImageLayout, ModelInputs
from .llama import LlamaDecoder
from .mllama_vision import TiledVisionEncoder
from .parts import build_projector, build_vision


@dataclass(frozen=True)
class ModelOutput:
    """logits: [B, T, vocab]; rows' padding positions hold no meaning."""

    logits: Tensor


class LanguageModel(nn.Module):
    """A Llama decoder alone, for text."""

    def __init__(self, config: AnyModelConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = LlamaDecoder(config.text)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.embedding.weight.device

    def read_images(self, inputs: ModelInputs) -> ReadImages | None:
        """What the decoder reads of the images: nothing here."""
        return None

    def embed(self, tokens: Tensor, images: ReadImages | None) -> Tensor:
        """What the decoder reads for tokens [B, T]: [B, T, E]."""
        return self.decoder.embedding(tokens)

    def forward(
        self,
        inputs: ModelInputs,
        *,
        images: ReadImages | None = None,
        self_cache: SelfAttentionCache | None = None,
        last_token_of: Sequence[int] | None = None,
    ) -> ModelOutput:
        """Logits of every token, or of one token a row (`last_token_of`).

        images: from `read_images`; without it the images in `inputs` are encoded here.
        self_cache: read and extended in place; without one the whole sequence is in `inputs`.

        Raises:
            PromptError: a position past the context or past the cache.
        """
        if images is None:
            images = self.read_images(inputs)
        device = self.device
        logits = self.decoder(
            self.embed(inputs.tokens.to(device), images),
            inputs.positions.to(device),
            inputs.visible,
            cross_cache=images if isinstance(images, CrossAttentionCache) else None,
            self_cache=self_cache,
            last_token_of=last_token_of,
        )
        return ModelOutput(logits)

    def hidden(self, inputs: ModelInputs, *, images: ReadImages | None = None) -> Tensor:
        """What the LM head reads of every token, [B, T, E], for losses that need no logits; rows may hold segments.

        Raises:
            PromptError: a position past the context.
        """
        if images is None:
            images = self.read_images(inputs)
        device = self.device
        return self.decoder.hidden(
            self.embed(inputs.tokens.to(device), images),
            inputs.positions.to(device),
            inputs.visible,
            cross_cache=images if isinstance(images, CrossAttentionCache) else None,
            segments=inputs.segments,
        )


class VisionLanguageModel(LanguageModel):
    """A vision encoder and a projector, read by a Llama decoder: through gated cross-attention (Llama 3.2 Vision), or
    as embeddings in the place of placeholder tokens (LLaVA, Idefics3, SmolVLM)."""

    config: ModelConfig

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)  # the parts in the order of the data
        self.config = config
        width = config.text.hidden_size
        self.vision = build_vision(config.vision)
        self.projector = build_projector(config.projector, config.vision.output_size, width)
        self.image_newline = nn.Parameter(width**-0.5 * torch.randn(width)) if config.grid_pinpoints else None
        self.decoder = LlamaDecoder(config.text)

    @classmethod
    def from_parts(cls, vision: Any, text: Any, **options: Any) -> VisionLanguageModel:
        """A model put together from an encoder and a text model: `llama_multimodal.from_parts`, which see, without the
        processor that it gives besides."""
        from ..assemble import from_parts

        return from_parts(vision, text, **options)[0]

    def encode_images(self, inputs: ModelInputs) -> Tensor:
        """Features of every tile's tokens, where all have one size: [tiles, tokens, vision output size]."""
        tiles = inputs.tiles.to(self.device, next(self.vision.parameters()).dtype)
        if isinstance(self.vision, TiledVisionEncoder):
            return self.vision(tiles, inputs.images)
        return self.vision(tiles)

    def read_images(self, inputs: ModelInputs, features: Tensor | None = None) -> ReadImages | None:
        """What the decoder reads of the batch's images: keys and values for every gated block, or embeddings. None
        without images.

        features: from `encode_images`, which is called without them.

        Raises:
            PromptError: images that do not become as many tokens as their places in the rows.
        """
        if not inputs.images:
            return None
        projected, lengths = self._projected(inputs, features)
        if self.config.fusion == "splice":
            pieces = projected.split(lengths)
            tiles = [piece.unflatten(0, (image.num_tiles, -1)) for piece, image in zip(pieces, inputs.images)]
            return SplicedImages(self._embeddings(tiles, inputs))
        starts = [0, *itertools.accumulate(lengths)]
        firsts = [0, *itertools.accumulate(inputs.images_per_row())]
        cache = CrossAttentionCache(starts, firsts)
        self.decoder.project_images(projected, cache)
        return cache

    def _projected(self, inputs: ModelInputs, features: Tensor | None) -> tuple[Tensor, list[int]]:
        """All images' tokens in the decoder's width, [S, E], and how many each has; pictures of one size go through
        together."""
        counts = [image.num_tiles for image in inputs.images]
        if features is not None or all(image.pixels is None for image in inputs.images):
            projected = self.projector(self.encode_images(inputs) if features is None else features)  # [M, T, E]
            return projected.flatten(0, 1), [count * projected.shape[1] for count in counts]
        tiles, dtype = inputs.tiles.split(counts), next(self.vision.parameters()).dtype
        sizes = [image.pixels or (inputs.tiles.shape[2], inputs.tiles.shape[3]) for image in inputs.images]
        pieces: dict[int, Tensor] = {}
        for height, width in dict.fromkeys(sizes):
            members = [i for i, size in enumerate(sizes) if size == (height, width)]
            pixels = torch.cat([tiles[i][:, :, :height, :width] for i in members])
            projected = self.projector(self.vision(pixels.to(self.device, dtype)))
            pieces |= zip(members, projected.split([counts[i] for i in members]))
        tokens = [pieces[i].flatten(0, 1) for i in range(len(counts))]
        return torch.cat(tokens), [len(piece) for piece in tokens]

    def embed(self, tokens: Tensor, images: ReadImages | None) -> Tensor:
        """What the decoder reads for tokens [B, T], spliced images in the place of theirs: [B, T, E]."""
        x = self.decoder.embedding(tokens)
        if not isinstance(images, SplicedImages):
            return x
        places = (tokens == self.config.image_token_id)[..., None]
        return x.masked_scatter(places, images.embeddings.to(x.dtype))

    def _embeddings(self, pieces: list[Tensor], inputs: ModelInputs) -> Tensor:
        """One embedding a placeholder, in their order: [placeholders, E]. pieces: of each image, [tiles, T, E]"""
        if self.image_newline is not None:
            pieces = [self._unpadded(tiles, image) for tiles, image in zip(pieces, inputs.images, strict=True)]
        for tiles, image in zip(pieces, inputs.images, strict=True):
            if tiles.shape[:-1].numel() != image.num_tokens:
                made = f"an image becomes {tiles.shape[:-1].numel()} tokens"
                raise PromptError(f"{made}, and row {image.row} has {image.num_tokens} places for it")
        return torch.cat([tiles.flatten(0, -2) for tiles in pieces])

    def _unpadded(self, tiles: Tensor, image: ImageLayout) -> Tensor:
        """LLaVA-NeXT's order: the whole picture, then the crops side by side without their padding, and a newline
        behind each row of patches; [tiles, P², E] → [tokens, E]."""
        assert self.image_newline is not None
        side = math.isqrt(tiles.shape[1])
        whole, crops = tiles[0], tiles[1:].unflatten(1, (side, side)).unflatten(0, (image.rows, image.columns))
        grid = crops.transpose(1, 2).flatten(2, 3).flatten(0, 1)[image.unpadded_patches(side)]  # [rows, columns, E]
        newline = self.image_newline.expand(len(grid), 1, -1)
        return torch.cat((whole, torch.cat((grid, newline), dim=1).flatten(0, 1)))


def build_model(config: AnyModelConfig) -> LanguageModel:
    """The model of a configuration, with fresh weights."""
    return LanguageModel(config) if isinstance(config, LanguageModelConfig) else VisionLanguageModel(config)
