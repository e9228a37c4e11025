"""SigLIP (Zhai et al. 2023) and SigLIP 2 (Tschannen et al. 2025): a transformer of patches without a class token.

SigLIP 2 for variable resolution (NaFlex) differs in how positions are resized and how patches are stored. Its images
keep their shape, so each comes in a batch of its own size; there is no padding to mask.

Shapes: N images · T tokens · E hidden size
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..config import SiglipConfig
from ..errors import ConfigError
from .layers import Linear, merge_heads, split_heads
from .vit import ImageEncoder, VitBlock, VitMLP


class PoolingHead(nn.Module):
    """One learned query reads all tokens of an image (Zhai et al. 2022, "Scaling vision transformers")."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.probe = nn.Parameter(size**-0.5 * torch.randn(size))
        self.in_proj = Linear(size, 3 * size)  # q, k, v: one weight, as the checkpoints have it
        self.o_proj = Linear(size, size)
        self.norm = nn.LayerNorm(size, eps=config.norm_eps)
        self.mlp = VitMLP(size, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, E] → [N, E]"""
        size = x.shape[-1]
        weight, bias = self.in_proj.weight, self.in_proj.bias
        q = ops.linear(self.probe.expand(len(x), 1, -1), weight[:size], bias[:size])
        k, v = ops.linear(x, weight[size:], bias[size:]).chunk(2, dim=-1)
        q, k, v = (split_heads(part, self.num_heads) for part in (q, k, v))
        x = self.o_proj(merge_heads(ops.attention(q, k, v)))[:, 0]
        return x + self.mlp(self.norm(x))


class SiglipEncoder(ImageEncoder):
    """Pixels → features of the patches, after the final norm unless `config.layer` asks for a state before it."""

    config: SiglipConfig

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__(config, patch_bias=True, class_token=False)
        size = config.hidden_size
        self.layers = nn.ModuleList(
            VitBlock(config, VitMLP(size, config.intermediate_size, config.hidden_act))
            for _ in range(config.num_hidden_layers)
        )
        self.post_norm = nn.LayerNorm(size, eps=config.norm_eps)
        self.head = PoolingHead(config) if config.pooling_head else None

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [N, 3, H, W] → [N, T, E]

        Raises:
            ImageError: images of another shape or size than the encoder takes.
        """
        _, x = self.embed(pixels)
        x = self.run(x, self.config.num_blocks)
        return self.post_norm(x) if self.config.layer is None else x

    def pooled(self, pixels: Tensor) -> Tensor:
        """What the head reads from the final state, [N, 3, H, W] → [N, E].

        Raises:
            ConfigError: the checkpoint has no pooling head.
        """
        if self.head is None:
            raise ConfigError("this SigLIP encoder has no pooling head; use the features of its patches")
        _, x = self.embed(pixels)
        return self.head(self.post_norm(self.run(x, self.config.num_hidden_layers)))
