"""Temporaries and saved activations of the vision encoders, as `models/mllama_vision.py` and `models/vit.py` run.

All tiles of a batch run at once. Letters: E hidden size · F width of the feed-forward block, of the encoder.
"""

from __future__ import annotations

import math
from typing import Any

from ..config import ClipVisionConfig, Dinov2Config, TiledVisionConfig, VitConfig
from .options import PlanOptions, Workload

_MLP_TOKENS = 2048  # of a picture, which `mllama_vision` feeds forward at a time


def encoder_peak(vision: Any, options: PlanOptions, load: Workload) -> int:
    """The most that is alive while an encoder runs without gradients, its result included."""
    if isinstance(vision, TiledVisionConfig):
        return _tiled_peak(vision, options, load)
    size, inner = vision.hidden_size, vision.intermediate_size // load.split
    # What entered the first block and this one, the attention's result, the sum and its norm: 5 E; then the hidden
    # values, and what comes out (the quick GELU and SwiGLU hold more hidden values when nothing has come out yet).
    feed = 6 * size + inner
    if isinstance(vision, ClipVisionConfig) and vision.hidden_act == "quick_gelu":
        feed = max(feed, 5 * size + 3 * inner)
    if isinstance(vision, Dinov2Config) and vision.swiglu:
        feed = max(feed, 5 * size + (3 if options.fused else 4) * inner)
    attention = 3 * size + 5 * size // load.split  # two inputs, a norm; queries, keys, values, the result in two orders
    return load.tiles * _tokens(vision, load) * max(feed, attention) * options.width


def encoder_saved(vision: Any, options: PlanOptions, load: Workload) -> tuple[int, int]:
    """What the backward pass of one block needs of its forward pass, and what a block's input takes; in bytes.

    A layer norm keeps its input in fp32 (2 E), and the layers behind it its output (2 E); queries, keys, values and the
    result in two orders: 5 E; the hidden values before and behind the GELU: 2 F.
    """
    if isinstance(vision, TiledVisionConfig):
        tokens, inner = load.images * _picture_tokens(vision, load), vision.intermediate_size
    else:
        tokens, inner = load.tiles * _tokens(vision, load), vision.intermediate_size
    hidden = 2
    if isinstance(vision, ClipVisionConfig) and vision.hidden_act == "quick_gelu":
        hidden = 3
    if isinstance(vision, Dinov2Config) and vision.swiglu:
        hidden = 3 if options.fused else 4
    size = vision.hidden_size
    inputs = tokens * size * options.wide
    return 2 * inputs + tokens * (7 * size + hidden * inner) * options.width, inputs


def num_blocks(vision: Any) -> int:
    """Blocks that run."""
    if isinstance(vision, TiledVisionConfig):
        return vision.num_hidden_layers + vision.num_global_layers
    return vision.num_blocks


def _tokens(vision: VitConfig, load: Workload) -> int:
    """Tokens of one tile in the blocks, those included that are not returned."""
    rows, columns = vision.grid(*load.tile_size)
    extra = 1 if isinstance(vision, ClipVisionConfig) else 0
    extra += 1 + vision.num_register_tokens if isinstance(vision, Dinov2Config) else 0
    return rows * columns + extra


def _picture_tokens(vision: TiledVisionConfig, load: Workload) -> int:
    """Tokens of one picture: its tiles', one tile's for all padding, and one for what fills tiles up to eights."""
    tiles = load.tiles // load.images
    return (tiles + (tiles < vision.max_num_tiles)) * vision.num_patches + (vision.num_patches % 8 > 0)


def _tiled_peak(vision: TiledVisionConfig, options: PlanOptions, load: Workload) -> int:
    size, tokens = vision.hidden_size, _picture_tokens(vision, load)
    real = load.tiles // load.images * vision.num_patches
    kept = len(vision.intermediate_layers_indices) * tokens * size  # states that are returned as well
    piece = math.ceil(tokens / math.ceil(tokens / _MLP_TOKENS))
    # Input, norm, queries, keys and values; the result for pictures and for padding, joined, and the latter once more.
    attention = 2 * tokens * size + (5 * tokens + tokens - real) * size // load.split
    # Input, the attention's result, the sum, its norm, what comes out; a piece's hidden values and its result.
    feed = 5 * tokens * size + piece * (vision.intermediate_size // load.split + size)
    joined = tokens * size + real * vision.output_size
    return load.images * (kept + max(attention, feed, joined)) * options.width
