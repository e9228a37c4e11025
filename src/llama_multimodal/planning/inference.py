"""What answering takes besides the weights: `generate.generate`, phase by phase.

It allocates the self-attention cache at its whole length, reads the pictures, reads the prompt in one go, and then
takes a token a step. Temporaries are counted where most of them are alive. torch's `nn.Module` keeps the arguments of a
call until it returns, so what enters the decoder, a block and a layer lives as long as that runs.

Letters: E hidden size · F width of the feed-forward block · K width of keys · V vocabulary, all of the decoder; tokens
are those of the whole batch
"""

from __future__ import annotations

from ..config import AnyModelConfig, ModelConfig, TextConfig
from .options import PlanOptions, Workload
from .vision import encoder_peak


def self_cache(text: TextConfig, options: PlanOptions, load: Workload) -> int:
    """Keys and values of every self-attention layer, `cache.SelfAttentionCache`."""
    keys = text.num_key_value_heads // load.split * text.head_dim
    return 2 * len(text.self_attention_layers) * load.rows * load.context * keys * options.width


def cross_cache(config: AnyModelConfig, options: PlanOptions, load: Workload) -> int:
    """Keys and values of the real tiles' tokens for every gated block, `cache.CrossAttentionCache`."""
    text = config.text
    keys = text.num_key_value_heads // load.split * text.head_dim
    return 2 * len(text.cross_attention_layers) * vision_tokens(config, load) * keys * options.width


def vision_tokens(config: AnyModelConfig, load: Workload) -> int:
    """Tokens that the decoder reads of all pictures, before newlines."""
    return load.tiles * config.num_tokens(*load.tile_size) if isinstance(config, ModelConfig) and load.tiles else 0


def image_embeddings(config: AnyModelConfig, options: PlanOptions, load: Workload) -> int:
    """What takes the placeholders' places in a spliced model, `cache.SplicedImages`."""
    if not isinstance(config, ModelConfig) or config.fusion != "splice":
        return 0
    return vision_tokens(config, load) * config.text.hidden_size * options.width


def vision_peak(config: AnyModelConfig, options: PlanOptions, load: Workload) -> int:
    """The most that is alive while pictures are encoded and brought to the decoder's width, pixels included."""
    if not isinstance(config, ModelConfig) or not load.tiles:
        return 0
    height, width = load.tile_size
    pixels = load.tiles * 3 * height * width * options.width
    features = load.tiles * config.vision.num_tokens(height, width) * config.vision.output_size * options.width
    # The features, what the projector makes of them, and within an MLP what lies between its two layers.
    projected = features + 2 * vision_tokens(config, load) * config.text.hidden_size * options.width
    return max(pixels + encoder_peak(config.vision, options, load), projected)


def projection_peak(config: AnyModelConfig, options: PlanOptions, load: Workload) -> int:
    """Besides the cache, while the projected features become keys and values: they, and one layer's norm of keys."""
    text = config.text
    keys = text.num_key_value_heads // load.split * text.head_dim
    tokens = vision_tokens(config, load)
    norm = 0 if options.fused else keys * (2 * options.wide)
    return tokens * (text.hidden_size * options.width + 2 * keys * options.width + norm)


def prefill_peak(text: TextConfig, options: PlanOptions, load: Workload) -> int:
    """One block's temporaries over the whole prompts, and the angles of all positions.

    Alive in the feed-forward layer: what entered the decoder, what entered the block, the attention's result, the sum,
    its norm (5 E); gate, up, their product (3 F), and without a kernel the activated gate (F). In the attention: what
    entered, its norm, and queries, keys and values before and after the rotation.
    """
    size, inner = text.hidden_size, text.intermediate_size // load.split
    keys, queries = text.num_key_value_heads // load.split * text.head_dim, size // load.split
    feed = (5 * size + (3 if options.fused else 4) * inner) * options.width
    rotated = (queries + keys) * options.width
    if not options.fused:  # in fp32: the two turned halves, joined, and what was read where it was narrower
        rotated = queries * options.wide * (2 if options.width == options.wide else 3)
    attention = (3 * size + queries + 2 * keys) * options.width + rotated
    tokens = load.rows * load.prompt
    return tokens * (max(feed, attention) + token_overhead(text))


def token_overhead(text: TextConfig) -> int:
    """Bytes a token besides activations: cosines and sines in fp32, its id, position and range of visible images."""
    return 2 * text.head_dim // 2 * 4 + 8 + 8 + 16


def decode_peak(text: TextConfig, options: PlanOptions, load: Workload) -> int:
    """One token a sequence: its logits and those of the step before, a row of them in fp32, one block's temporaries."""
    logits = text.vocab_size * (2 * load.rows * options.width + options.wide)
    return logits + load.rows * (5 * text.hidden_size + 4 * text.intermediate_size) * options.width
