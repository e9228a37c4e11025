"""The vision encoders' configurations."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import require


@dataclass(frozen=True)
class TiledVisionConfig:
    """The tiled vision encoder of Llama 3.2 Vision (defaults: 11B Instruct)."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_global_layers: int = 8
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 560  # side of one tile, pixels
    patch_size: int = 14
    max_num_tiles: int = 4
    intermediate_layers_indices: tuple[int, ...] = (3, 7, 15, 23, 30)
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        require(self.image_size % self.patch_size == 0, "image_size must be a multiple of patch_size", self)
        require(self.hidden_size % self.num_attention_heads == 0, "hidden_size must divide into the heads", self)
        taps = self.intermediate_layers_indices
        require(list(taps) == sorted(set(taps)), "intermediate_layers_indices must ascend", self)
        require(all(0 <= i < self.num_hidden_layers for i in taps), "intermediate_layers_indices out of range", self)

    @property
    def num_patches(self) -> int:
        """Tokens of one tile: its patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def num_tokens(self, height: int, width: int) -> int:
        """Tokens of one tile, whose size is fixed."""
        return self.num_patches

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def output_size(self) -> int:
        """Width of the features handed to the projector: the final state and every tap."""
        return self.hidden_size * (1 + len(self.intermediate_layers_indices))

    @property
    def aspect_ratios(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of aspect-ratio ids 1, 2, …: every grid of at most `max_num_tiles` tiles."""
        n = self.max_num_tiles
        return tuple((h, w) for h in range(1, n + 1) for w in range(1, n + 1) if h * w <= n)
