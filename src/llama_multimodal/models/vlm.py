"""The whole models: a decoder alone, and encoder → projector → decoder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..cache import CrossAttentionCache, SelfAttentionCache
from ..config import AnyModelConfig, LanguageModelConfig, ModelConfig
from ..inputs import ModelInputs
from .layers import Linear
from .llama import LlamaDecoder
from .mllama_vision import TiledVisionEncoder


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

    def cross_attention_cache(self, inputs: ModelInputs) -> CrossAttentionCache | None:
        """What gated blocks read: nothing here."""
        return None

    def forward(
        self,
        inputs: ModelInputs,
        *,
        cross_cache: CrossAttentionCache | None = None,
        self_cache: SelfAttentionCache | None = None,
        last_token_of: Sequence[int] | None = None,
    ) -> ModelOutput:
        """Logits of every token, or of one token a row (`last_token_of`).

        cross_cache: from `cross_attention_cache`; without one the images in `inputs` are encoded here.
        self_cache: read and extended in place; without one the whole sequence is in `inputs`.

        Raises:
            PromptError: a position past the context or past the cache.
        """
        if cross_cache is None:
            cross_cache = self.cross_attention_cache(inputs)
        device = self.device
        logits = self.decoder(
            inputs.tokens.to(device),
            inputs.positions.to(device),
            inputs.visible,
            cross_cache=cross_cache,
            self_cache=self_cache,
            last_token_of=last_token_of,
        )
        return ModelOutput(logits)


class VisionLanguageModel(LanguageModel):
    """A tiled vision encoder read by a Llama decoder through gated cross-attention (Llama 3.2 Vision)."""

    config: ModelConfig

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)  # the parts in the order of the data
        self.config = config
        self.vision = TiledVisionEncoder(config.vision)
        self.projector = Linear(config.vision.output_size, config.text.hidden_size)
        self.decoder = LlamaDecoder(config.text)

    def encode_images(self, inputs: ModelInputs) -> Tensor:
        """Features of every real tile's tokens: [tiles, tokens, vision output size]."""
        return self.vision(inputs.tiles.to(self.device, self.dtype), inputs.images)

    def cross_attention_cache(self, inputs: ModelInputs, features: Tensor | None = None) -> CrossAttentionCache | None:
        """Keys and values of the batch's images for every gated block; None without images.

        features: from `encode_images`, which is called without them.
        """
        if not inputs.images:
            return None
        tokens = self.config.vision.num_patches
        starts = [0, *itertools.accumulate(image.num_tiles * tokens for image in inputs.images)]
        firsts = [0, *itertools.accumulate(inputs.images_per_row())]
        cache = CrossAttentionCache(starts, firsts)
        if features is None:
            features = self.encode_images(inputs)
        self.decoder.project_images(self.projector(features.flatten(0, 1)), cache)
        return cache


def build_model(config: AnyModelConfig) -> LanguageModel:
    """The model of a configuration, with fresh weights."""
    return LanguageModel(config) if isinstance(config, LanguageModelConfig) else VisionLanguageModel(config)
