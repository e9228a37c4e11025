"""What the vision transformers of single images share: patches, positions and blocks (Dosovitskiy et al. 2020).

Shapes: N images · H, W height and width in pixels · R, C rows and columns of patches · P side of a patch · T tokens
E hidden size · F width of the feed-forward block
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import Activation, VitConfig
from ..errors import ImageError
from .layers import Linear, merge_heads, split_heads

_QUICK = 1.702  # of the logistic function that stands for the normal distribution in the quick GELU


class PatchEmbedding(Linear):
    """A linear map of every patch, which is a convolution whose stride is its width."""

    def __init__(self, config: VitConfig, bias: bool) -> None:
        super().__init__(config.num_channels * config.patch_size**2, config.hidden_size, bias=bias)
        self.patch_size = config.patch_size

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, R·P, C·P] → [N, R·C, E]"""
        patch = self.patch_size
        cut = pixels.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [N, 3, R, P, C, P]
        return super().forward(cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2).to(self.weight.dtype))


class VitAttention(nn.Module):
    """Attention among all tokens of an image."""

    def __init__(self, size: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj = (Linear(size, size, bias=qkv_bias) for _ in range(3))
        self.o_proj = Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(merge_heads(ops.attention(q, k, v)))


class VitMLP(nn.Module):
    """Two linear maps with a GELU between."""

    def __init__(self, size: int, intermediate_size: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = Linear(size, intermediate_size)
        self.fc2 = Linear(intermediate_size, size)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "quick_gelu":
            hidden = self.fc1(x)
            return self.fc2(hidden * torch.sigmoid(_QUICK * hidden))
        tanh = self.activation == "gelu_pytorch_tanh"
        return self.fc2(self.fc1.gelu(x, "tanh" if tanh else "none"))


class SwigluMLP(nn.Module):
    """The gated feed-forward block (Shazeer 2020), gate and up side by side in one weight [2F, E], with biases."""

    def __init__(self, size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = Linear(size, 2 * intermediate_size)
        self.down_proj = Linear(intermediate_size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_up(x)))


class VitBlock(nn.Module):
    """Pre-norm block; with layer scale (Touvron et al. 2021) each branch has a factor a channel."""

    def __init__(
        self, config: VitConfig, mlp: VitMLP | SwigluMLP, *, qkv_bias: bool = True, layer_scale: bool = False
    ) -> None:
        super().__init__()
        size = config.hidden_size
        self.attention_norm = nn.LayerNorm(size, eps=config.norm_eps)
        self.attention = VitAttention(size, config.num_attention_heads, qkv_bias)
        self.attention_scale = nn.Parameter(torch.ones(size)) if layer_scale else None
        self.mlp_norm = nn.LayerNorm(size, eps=config.norm_eps)
        self.mlp = mlp
        self.mlp_scale = nn.Parameter(torch.ones(size)) if layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attention(self.attention_norm(x))
        x = x + (attended if self.attention_scale is None else self.attention_scale * attended)
        fed = self.mlp(self.mlp_norm(x))
        return x + (fed if self.mlp_scale is None else self.mlp_scale * fed)


class ImageEncoder(nn.Module):
    """A vision transformer: `encoder(pixels)` gives the features of every image's tokens, [N, 3, H, W] → [N, T, E].

    Images have the size of the configuration, or another whose sides are multiples of the patch.
    """

    config: VitConfig
    layers: nn.ModuleList

    def __init__(self, config: VitConfig, *, patch_bias: bool, class_token: bool) -> None:
        """class_token: the first row of the position table belongs to it"""
        super().__init__()
        self.config = config
        size, scale = config.hidden_size, config.hidden_size**-0.5
        self.patch_embedding = PatchEmbedding(config, patch_bias)
        self.class_embedding = nn.Parameter(scale * torch.randn(size)) if class_token else None
        self.position_embedding = nn.Parameter(scale * torch.randn(config.side**2 + class_token, size))

    def pooled(self, pixels: Tensor) -> Tensor:
        """One vector an image, [N, 3, H, W] → [N, E]."""
        raise NotImplementedError

    def embed(self, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        """Class token [N, 1, E], where there is one, and patches [N, R·C, E], with their positions."""
        if pixels.ndim != 4 or pixels.shape[1] != self.config.num_channels:
            wanted = f"[images, {self.config.num_channels}, height, width]"
            raise ImageError(f"pixels must be {wanted}, not {list(pixels.shape)}")
        rows, columns = self.config.grid(*pixels.shape[2:])
        patch, table = self.config.patch_size, self.position_embedding
        x = self.patch_embedding(pixels[:, :, : rows * patch, : columns * patch])
        if self.class_embedding is None:
            return None, x + self.resize(table, rows, columns)
        cls = (self.class_embedding + table[0]).expand(len(x), 1, -1)
        return cls, x + self.resize(table[1:], rows, columns)

    def resize(self, table: Tensor, rows: int, columns: int) -> Tensor:
        """The position table of patches for another grid, [side², E] → [R·C, E].

        Interpolated in fp32 at least: in half precision, positions move by more than the rounding of the result.
        """
        side, config = math.isqrt(len(table)), self.config
        if (rows, columns) == (side, side):
            return table
        wide = table.to(torch.promote_types(table.dtype, torch.float32))
        grid = wide.unflatten(0, (side, side)).permute(2, 0, 1)[None]  # [1, E, side, side]
        grid = F.interpolate(grid, (rows, columns), mode=config.position_mode, antialias=config.position_antialias)
        return grid[0].flatten(1).T.to(table.dtype)

    def run(self, x: Tensor, num_blocks: int) -> Tensor:
        """x: [N, T, E] through the first blocks."""
        for block in itertools.islice(self.layers, num_blocks):
            x = block(x)
        return x
