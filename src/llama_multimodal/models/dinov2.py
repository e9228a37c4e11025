"""DINOv2 (Oquab et al. 2023), also with registers (Darcet et al. 2023): a class token, registers, then the patches.

Shapes: N images · T tokens · G registers · E hidden size
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import Dinov2Config
from .vit import ImageEncoder, SwigluMLP, VitBlock, VitMLP


class Dinov2Encoder(ImageEncoder):
    """Pixels → features of the tokens, after the final norm unless `config.layer` asks for a state before it."""

    config: Dinov2Config

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__(config, patch_bias=True, class_token=True)
        size, width = config.hidden_size, config.intermediate_size
        registers = size**-0.5 * torch.randn(config.num_register_tokens, size)
        self.register_embedding = nn.Parameter(registers) if config.num_register_tokens else None
        self.layers = nn.ModuleList(
            VitBlock(
                config,
                SwigluMLP(size, width) if config.swiglu else VitMLP(size, width, config.hidden_act),
                qkv_bias=config.qkv_bias,
                layer_scale=True,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.post_norm = nn.LayerNorm(size, eps=config.norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [N, 3, H, W] → [N, T, E], in the order class token, registers, patches

        Raises:
            ImageError: images of another shape or size than the encoder takes.
        """
        config = self.config
        x = self._states(pixels, config.num_blocks)
        cls, registers, patches = x.tensor_split((1, 1 + config.num_register_tokens), dim=1)
        kept = [cls] * config.with_class_token + [registers] * config.with_registers + [patches]
        x = torch.cat(kept, dim=1) if len(kept) < 3 else x
        return self.post_norm(x) if config.layer is None else x

    def pooled(self, pixels: Tensor) -> Tensor:
        """The class token's final state, normalised, [N, 3, H, W] → [N, E]."""
        return self.post_norm(self._states(pixels, self.config.num_hidden_layers)[:, 0])

    def _states(self, pixels: Tensor, num_blocks: int) -> Tensor:
        cls, patches = self.embed(pixels)
        assert cls is not None
        parts = [cls, patches]
        if self.register_embedding is not None:  # they have no positions
            parts.insert(1, self.register_embedding.expand(len(patches), -1, -1))  # [N, G, E]
        return self.run(torch.cat(parts, dim=1), num_blocks)
