"""What a decoder remembers between calls. Always passed as an argument, never kept by a model.

Shapes: L layers · B rows · Hkv key heads · C capacity in tokens · S vision tokens in the batch · D head dim
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import TextConfig
from .errors import PromptError


@dataclass
class SelfAttentionCache:
    """Keys and values of the text so far, dense: row b's token at position p lies at slot p."""

    keys: list[Tensor]  # L of [B, Hkv, C, D]
    values: list[Tensor]

    @classmethod
    def allocate(
        cls,
        config: TextConfig,
        num_rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        num_kv_heads: int | None = None,
    ) -> SelfAttentionCache:
        """An empty cache for `num_rows` sequences of at most `capacity` tokens.

        num_kv_heads: of this process, where several share the heads; None: the configuration's
        """
        shape = (num_rows, num_kv_heads or config.num_key_value_heads, capacity, config.head_dim)
        layers = range(len(config.self_attention_layers))
        return cls(
            [torch.zeros(shape, dtype=dtype, device=device) for _ in layers],
            [torch.zeros(shape, dtype=dtype, device=device) for _ in layers],
        )

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, Hkv, T, D] at `positions` [B, T]; returns the layer's whole keys and values.

        Padding of a short row lands in slots that the row's own tokens later overwrite, and no query sees a slot past
        its own position.
        """
        slots = positions[:, None, :, None].expand_as(k)
        self.keys[layer].scatter_(2, slots, k)
        self.values[layer].scatter_(2, slots, v)
        return self.keys[layer], self.values[layer]

    def check_room(self, end: int) -> None:
        """Raises:
        PromptError: position `end - 1` does not fit.
        """
        if end > self.capacity:
            raise PromptError(f"the cache holds {self.capacity} tokens but position {end - 1} was asked for")


@dataclass
class CrossAttentionCache:
    """Keys and values of the real tiles' tokens, projected once; images lie one after the other along S."""

    image_starts: list[int]  # N + 1 offsets along S
    first_image: list[int]  # B + 1: where each row's images begin
    keys: list[Tensor] = field(default_factory=list)  # one a cross-attention layer, [Hkv, S, D]
    values: list[Tensor] = field(default_factory=list)

    def key_range(self, row: int, first: int, end: int) -> tuple[int, int]:
        """The vision tokens of images [first, end) of a row."""
        base = self.first_image[row]
        return self.image_starts[base + first], self.image_starts[base + end]


@dataclass
class SplicedImages:
    """Embeddings of the batch's images, one for each placeholder token in the order of rows: [placeholders, E]."""

    embeddings: Tensor


ReadImages = CrossAttentionCache | SplicedImages
"""What a model's decoder reads of the images, by its fusion."""
