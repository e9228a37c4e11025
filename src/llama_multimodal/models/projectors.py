"""Projectors: an encoder's features as vectors of the decoder's width, [N, T, E] → [N, T', D].

Shapes: N images or tiles · T, T' tokens · E the encoder's width · D the decoder's · s scale factor
"""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from ..config import LinearProjector, MLPProjector, PixelShuffleProjector
from .layers import Linear


class MLP(nn.Module):
    """Linear, GELU, linear (Liu et al. 2023, "Improved baselines with visual instruction tuning")."""

    def __init__(self, config: MLPProjector, vision_size: int, text_size: int) -> None:
        super().__init__()
        self.approximate: ops.Approximation = "tanh" if config.hidden_act == "gelu_pytorch_tanh" else "none"
        self.fc1 = Linear(vision_size, text_size, bias=config.bias)
        self.fc2 = Linear(text_size, text_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1.gelu(x, self.approximate))


class PixelShuffle(nn.Module):
    """Every square of s × s patches as one token, then a linear layer (Laurençon et al. 2024, "Building and better
    understanding vision-language models")."""

    def __init__(self, config: PixelShuffleProjector, vision_size: int, text_size: int) -> None:
        super().__init__()
        self.scale_factor = config.scale_factor
        self.proj = Linear(vision_size * config.scale_factor**2, text_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        side, s = round(x.shape[1] ** 0.5), self.scale_factor
        squares = x.unflatten(1, (side // s, s, side // s, s)).transpose(2, 3)  # [N, rows, columns, s, s, E]
        return self.proj(squares.flatten(3).flatten(1, 2))


def linear(config: LinearProjector, vision_size: int, text_size: int) -> nn.Module:
    return Linear(vision_size, text_size, bias=config.bias)


def identity(config: object, vision_size: int, text_size: int) -> nn.Module:
    return nn.Identity()
