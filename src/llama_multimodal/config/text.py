"""The Llama decoder's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import require


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (`rope_type: llama3`)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LinearRopeScaling:
    """Positions divided by a factor (`rope_type: linear`), as in Vicuna's models with a longer context."""

    factor: float


@dataclass(frozen=True)
class TextConfig:
    """The Llama decoder (defaults: 11B). `num_hidden_layers` counts self- and cross-attention blocks together."""

    vocab_size: int = 128256
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    cross_attention_layers: tuple[int, ...] = (3, 8, 13, 18, 23, 28, 33, 38)
    max_position_embeddings: int = 131072
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | LinearRopeScaling | None = RopeScaling()
    rms_norm_eps: float = 1e-5
    num_extra_embeddings: int = 8  # rows of the embedding past the vocabulary; the first is `<|image|>`
    bos_token_id: int = 128000
    eos_token_ids: tuple[int, ...] = (128001, 128008, 128009)
    pad_token_id: int = 128004
    tie_word_embeddings: bool = False  # the LM head is the embedding

    def __post_init__(self) -> None:
        require(self.hidden_size % self.num_attention_heads == 0, "hidden_size must divide into the heads", self)
        require(self.num_attention_heads % self.num_key_value_heads == 0, "query heads must divide by kv heads", self)
        cross = self.cross_attention_layers
        require(list(cross) == sorted(set(cross)), "cross_attention_layers must ascend", self)
        require(all(0 <= i < self.num_hidden_layers for i in cross), "cross_attention_layers out of range", self)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def self_attention_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_hidden_layers) if i not in self.cross_attention_layers)
