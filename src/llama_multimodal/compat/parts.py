"""The original's parts by name, over `models` and `ops`.

Shapes: B batch · T tokens · E hidden size · H query heads · D head dim · F width of the feed-forward block
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..adapters.config import LoraConfig
from ..adapters.layers import AdapterSet, Lora, LoraLinear, LowRank
from ..config import TextConfig
from ..errors import ConfigError
from ..models.layers import Linear, RMSNorm
from ..models.llama import MLP, SelfAttention, SelfAttentionBlock
from ..models.parts import build_projector
from . import rope_cuda
from .config import MLLAMAConfig, text_config_of

TextTable = Mapping[str, Any] | TextConfig | MLLAMAConfig
"""A decoder's configuration: the original's table, ours, or the whole model's."""

_ADAPTER = "default"  # its name in a `Linear_LORA`


class LLAMARMSNorm(RMSNorm):
    """Root-mean-square normalisation, [..., hidden_size] → the same."""

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps)


class LLAMARotaryEmbedding(nn.Module):
    """Rotates queries or keys by their positions."""

    freqs: Tensor  # [D/2], radians a token

    def __init__(self, dim: int, max_position_embeddings: int = 131072, base: float = 500000.0) -> None:
        """dim: of a head"""
        super().__init__()
        self.max_position_embeddings = max_position_embeddings
        self.register_buffer("freqs", ops.rope_frequencies(dim, base, None), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """x: [B, T, H, D], position_ids: [T] or [B, T], from 0 where there are none → [B, T, H, D]

        Raises:
            ConfigError: shapes that do not go together, or a position past `max_position_embeddings`.
        """
        last = x.shape[1] - 1 if position_ids is None else int(position_ids.max())
        if last >= self.max_position_embeddings:
            raise ConfigError(f"position {last} is past max_position_embeddings, {self.max_position_embeddings}")
        return rope_cuda.apply_rope(x, self.freqs, position_ids)


class FeedForward(MLP):
    """`w2(silu(w1 x) · w3 x)`, [..., E] → [..., E]: w1 is the gate, w3 up, w2 down."""

    def __init__(self, hidden_size: int, hidden_dim: int) -> None:
        one_head = {"n_heads": 1, "n_kv_heads": 1, "hidden_size": hidden_size, "hidden_dim": hidden_dim}
        super().__init__(text_config_of(one_head))

    @property
    def w1(self) -> Linear:
        return self.gate_up.gate_proj  # type: ignore[return-value]

    @property
    def w2(self) -> Linear:
        return self.down_proj

    @property
    def w3(self) -> Linear:
        return self.gate_up.up_proj  # type: ignore[return-value]


class GroupQueryAttention(nn.Module):
    """Causal self-attention with rotary positions: `models.llama.SelfAttention`."""

    def __init__(self, config: TextTable) -> None:
        super().__init__()
        self.config = text_config_of(config)
        self.attention = SelfAttention(self.config)

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """x: [B, T, E], position_ids: [T] or [B, T], from 0 where there are none → [B, T, E]"""
        return self.attention(x, *_whole_sequence(x, position_ids, self.config))


class TransformerBlock(nn.Module):
    """Self-attention and feed-forward, each behind a norm: `models.llama.SelfAttentionBlock`."""

    def __init__(self, config: TextTable) -> None:
        super().__init__()
        self.config = text_config_of(config)
        self.block = SelfAttentionBlock(self.config)

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """x: [B, T, E], position_ids: [T] or [B, T], from 0 where there are none → [B, T, E]"""
        return self.block(x, *_whole_sequence(x, position_ids, self.config))


def _whole_sequence(x: Tensor, position_ids: Tensor | None, config: TextConfig) -> tuple[Any, ...]:
    """What a block is called with besides x where there is no cache: angles, positions, mask, cache and layer."""
    if x.ndim != 3 or x.shape[2] != config.hidden_size:
        raise ConfigError(f"x must be [batch, seq, {config.hidden_size}], not {list(x.shape)}")
    rows, tokens, _ = x.shape
    positions = torch.arange(tokens, device=x.device) if position_ids is None else position_ids
    if positions.shape not in ((tokens,), (1, tokens), (rows, tokens)):
        raise ConfigError(f"position_ids must be [{rows}, {tokens}], not {list(positions.shape)}")
    frequencies = ops.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling).to(x.device)
    positions = positions.expand(rows, tokens)
    return ops.rope_angles(positions, frequencies), positions, None, None, 0


class MultiModalProjector(nn.Module):
    """The encoder's features as vectors of the decoder's width: linear, GELU, linear (`models.projectors.MLP`)."""

    def __init__(self, config: MLLAMAConfig) -> None:
        super().__init__()
        model = config.model
        self.mlp = build_projector(model.projector, model.vision.output_size, model.text.hidden_size)

    def forward(self, image_features: Tensor) -> Tensor:
        """[B, patches, encoder's width] → [B, patches, decoder's width]"""
        return self.mlp(image_features)


class Linear_LORA(LoraLinear):
    """`x Wᵀ + bias`, frozen, and `alpha / rank · x Aᵀ Bᵀ`, trained, which adds nothing at first: `adapters.layers`.

    `apply_lora` gives a whole model such layers.
    """

    def __init__(
        self, in_dim: int, out_dim: int, rank: int = 16, alpha: float = 32.0, dropout: float = 0.0, bias: bool = False
    ) -> None:
        """dropout: of the input of A, while training

        Raises:
            ConfigError: a value out of range.
        """
        config, shape = LoraConfig(rank, alpha, dropout), (out_dim, in_dim)
        base = Linear(in_dim, out_dim, bias).requires_grad_(False)
        adapters = AdapterSet({_ADAPTER: config}, choice=_ADAPTER, default=_ADAPTER)
        lora = Lora(adapters, shape, "Linear_LORA", reads_images=False)
        lora[_ADAPTER] = LowRank(shape, config, rank, alpha, base.weight.device, torch.float32)
        super().__init__(base, lora)

    @property
    def linear(self) -> nn.Module:
        """The frozen layer; assign to it, or to its weight, what the additions are for."""
        return self.base

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "linear":  # a module that is assigned passes by a property's setter
            super().__setattr__(name, value)
            return
        if not isinstance(value, nn.Linear) or value.weight.shape != self.lora.shape:
            wanted = f"[{self.lora.shape[0]}, {self.lora.shape[1]}]"
            raise ConfigError(f"linear must be a linear layer with a weight {wanted}, not {value!r}")
        self.base = value.requires_grad_(False)
