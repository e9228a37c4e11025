"""The image encoder of CLIP (Radford et al. 2021): a class token and patches, with a norm before the first block.

Shapes: N images · T tokens · E hidden size
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import ClipVisionConfig
from .vit import ImageEncoder, VitBlock, VitMLP


class ClipVisionEncoder(ImageEncoder):
    """Pixels → a hidden state as it leaves a block: the final norm is for the pooled output only.

    LLaVA reads `layer=-2` without the class token.
    """

    config: ClipVisionConfig

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__(config, patch_bias=False, class_token=True)
        size = config.hidden_size
        self.pre_norm = nn.LayerNorm(size, eps=config.norm_eps)
        self.layers = nn.ModuleList(
            VitBlock(config, VitMLP(size, config.intermediate_size, config.hidden_act))
            for _ in range(config.num_hidden_layers)
        )
        self.post_norm = nn.LayerNorm(size, eps=config.norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [N, 3, H, W] → [N, T, E]

        Raises:
            ImageError: images of another shape or size than the encoder takes.
        """
        x = self._states(pixels, self.config.num_blocks)
        return x if self.config.with_class_token else x[:, 1:]

    def pooled(self, pixels: Tensor) -> Tensor:
        """The class token's final state, normalised, [N, 3, H, W] → [N, E]; CLIP's own projection comes after it."""
        return self.post_norm(self._states(pixels, self.config.num_hidden_layers)[:, 0])

    def _states(self, pixels: Tensor, num_blocks: int) -> Tensor:
        cls, patches = self.embed(pixels)
        assert cls is not None
        return self.run(self.pre_norm(torch.cat((cls, patches), dim=1)), num_blocks)
