"""The least time that a card needs for a step: what must be read at its bandwidth, or what must be computed at its
rate, whichever takes longer (Williams et al. 2009). No program is faster; none of this was measured.

A decoding step reads every weight that takes part once, whatever the number of rows, and every row's keys and values.
Gated blocks take part where a row looks at an image; their key and value projections do not: an image is projected
once. Products of packed weights are counted as bf16 ones, which is how they are computed.

Letters: E hidden size · K width of keys · T tokens of a prompt · S vision tokens of a picture
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from ..config import AnyModelConfig, ModelConfig, TextConfig, TiledVisionConfig
from .gpus import Gpu
from .options import Packed
from .parameters import block_matrices, count_parameters
from .vision import num_blocks

_WIDTH = 2  # bytes of a bf16 value: caches, and weights that are not packed


@dataclass(frozen=True)
class Floor:
    """bytes: that are read at least. operations: that are computed at least, a multiplication and an addition being
    two."""

    bytes: int
    operations: int

    def seconds(self, gpu: Gpu) -> float:
        """The least time on a card."""
        return max(self.bytes / (gpu.bandwidth * 1e9), self.operations / (gpu.bf16 * 1e12))


def decode_floor(
    config: AnyModelConfig, packed: Packed | None = None, *, rows: int = 1, context: int = 1024, tiles: int = 0
) -> Floor:
    """A token for each of `rows` sequences of `context` tokens; tiles: of the picture that each looks at."""
    text, seen = config.text, _vision_tokens(config, tiles)
    weights, values = _decoder_weights(text, packed, looks=seen > 0)
    keys = text.num_key_value_heads * text.head_dim
    reads = rows * (len(text.self_attention_layers) * context + len(text.cross_attention_layers) * seen)
    return Floor(
        weights + reads * 2 * keys * _WIDTH + rows * text.hidden_size * _WIDTH,
        2 * rows * values + 4 * text.hidden_size * reads,
    )


def vision_floor(config: ModelConfig, tiles: int) -> Floor:
    """A picture through the encoder and the projector."""
    vision, counted = config.vision, count_parameters(config)
    each = vision.num_tokens(vision.image_size, vision.image_size)
    tokens, size = tiles * each, cast(Any, vision).hidden_size
    seen = tokens if isinstance(vision, TiledVisionConfig) else each  # the tiles of a picture see each other
    attention = 4 * size * tokens * seen * num_blocks(vision)
    products = 2 * tokens * (counted.vision_matrices + counted.projector)
    return Floor((counted.vision_matrices + counted.projector) * _WIDTH, products + attention)


def prefill_floor(config: AnyModelConfig, packed: Packed | None = None, *, prompt: int, tiles: int = 0) -> Floor:
    """A prompt of text through the decoder, all of whose tokens look at a picture of so many tiles."""
    text, seen = config.text, _vision_tokens(config, tiles)
    weights, values = _decoder_weights(text, packed, looks=seen > 0)
    head = text.vocab_size * text.hidden_size  # of the last token alone
    cross, own = len(text.cross_attention_layers), len(text.self_attention_layers)
    projections = cross * 2 * text.hidden_size * text.num_key_value_heads * text.head_dim if seen else 0
    pairs = own * prompt * (prompt + 1) // 2 + cross * prompt * seen
    operations = 2 * prompt * (values - head) + 2 * head + 2 * seen * projections + 4 * text.hidden_size * pairs
    return Floor(weights + _gated_bytes(projections, packed), operations)


def first_token_seconds(
    config: ModelConfig, gpu: Gpu, packed: Packed | None = None, *, prompt: int, tiles: int
) -> float:
    """From pixels and tokens on the card to the first token of an answer: the picture, and then the prompt."""
    picture = vision_floor(config, tiles).seconds(gpu) if tiles else 0.0
    return picture + prefill_floor(config, packed, prompt=prompt, tiles=tiles).seconds(gpu)


def _vision_tokens(config: AnyModelConfig, tiles: int) -> int:
    if not tiles or not isinstance(config, ModelConfig):
        return 0
    return tiles * config.num_tokens(config.vision.image_size, config.vision.image_size)


def _decoder_weights(text: TextConfig, packed: Packed | None, *, looks: bool) -> tuple[int, int]:
    """Bytes and number of the weights that a step multiplies with."""
    size, block = text.hidden_size, block_matrices(text)
    cross = len(text.cross_attention_layers) if looks else 0
    gates = 2 * size * size  # queries and output of a gated block
    inner = 3 * size * text.intermediate_size
    plain, head = len(text.self_attention_layers) * block + cross * inner, text.vocab_size * size
    if packed is None:
        return (plain + cross * gates + head) * _WIDTH, plain + cross * gates + head
    tables = packed.num_bytes(head, lm_head=True) if not text.tie_word_embeddings else head * _WIDTH
    return packed.num_bytes(plain) + _gated_bytes(cross * gates, packed) + tables, plain + cross * gates + head


def _gated_bytes(values: int, packed: Packed | None) -> int:
    """Of so many weights of the gated blocks' attention."""
    return values * _WIDTH if packed is None or packed.keep_cross_attention else packed.num_bytes(values)
