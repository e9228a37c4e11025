"""What answering takes besides the weights: `generate.generate`, phase by phase.

It allocates the self-attention cache at its whole length, reads the pictures, reads the prompt in one go, and then
takes a token a step. Temporaries are counted where most of them are alive. torch's `nn.Module` keeps the arguments of a
call until it returns, so what enters the decoder, a block and a layer lives as long as that runs.

Letters: E hidden size · F width of the feed-forward block · K width of keys · V vocabulary, all of the decoder; tokens
are those of the whole batch
"""

from __future__ import annotations

from ..config import AnyModelConfig, ModelConfig, TextConfig
from .options import DTYPE_BYTES, PlanOptions, Workload
from .vision import encoder_peak

_UNPACKED_AT_ONCE = 2**21  # values of a packed weight, in `ops.linear`


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


def given_pixels(load: Workload) -> int:
    """The tiles of `inputs.ModelInputs`, in fp32; in the machine's own memory, so on a CPU among the rest."""
    height, width = load.tile_size
    return load.tiles * 3 * height * width * DTYPE_BYTES["fp32"]


def vision_peak(config: AnyModelConfig, options: PlanOptions, load: Workload) -> int:
    """The most that is alive while pictures are encoded and brought to the decoder's width, pixels included."""
    if not isinstance(config, ModelConfig) or not load.tiles:
        return 0
    height, width = load.tile_size
    # A copy of the inputs' pixels, unless they are there already as they are wanted.
    copied = options.device != "cpu" or options.width != options.wide
    pixels = given_pixels(load) // options.wide * options.width * copied
    features = load.tiles * config.vision.num_tokens(height, width) * config.vision.output_size * options.width
    # The features, what the projector makes of them, and within an MLP what lies between its two layers.
    projected = features + 2 * vision_tokens(config, load) * config.text.hidden_size * options.width
    return max(pixels + encoder_peak(config.vision, options, load), projected)


def projection_peak(config: AnyModelConfig, options: PlanOptions, load: Workload) -> int:
    """Besides what the decoder reads of the pictures, while it is made of the projected features: they, and one gated
    block's keys before their norm (without a kernel in fp32, and their squares)."""
    text, tokens = config.text, vision_tokens(config, load)
    made = 0
    if text.cross_attention_layers:
        keys = text.num_key_value_heads // load.split * text.head_dim
        made = keys * (options.width if options.fused else 2 * options.wide)
    return tokens * (text.hidden_size * options.width + made)


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
    unpacking = tokens * 5 * size * options.width + unpacked(text, options, load)
    return max(tokens * max(feed, attention), unpacking) + tokens * token_overhead(text)


def unpacked(text: TextConfig, options: PlanOptions, load: Workload) -> int:
    """While packed gate and up, which are one product, meet more rows than a kernel takes: their unpacked weights.

    On a GPU all of them, in fp32 three times over (before the zeros, before and behind the scales). On a CPU a piece at
    a time, beside the result and a piece of it.
    """
    if options.pack is None:
        return 0
    size, outputs = text.hidden_size, 2 * text.intermediate_size // load.split
    if options.device == "cuda":
        bytes_each = {"bf16": 6, "int8": 12, "int4": 13}[options.pack.format]
        return size * outputs * bytes_each
    if options.pack.format == options.dtype == "bf16":
        return 0
    piece = min(outputs, max(1, _UNPACKED_AT_ONCE // size // 16) * 16)
    tokens = load.rows * load.prompt
    return piece * size * options.wide + tokens * (outputs + piece) * options.width


def token_overhead(text: TextConfig) -> int:
    """Bytes a token besides activations: cosines and sines in fp32, its id, position and range of visible images."""
    return 2 * text.head_dim // 2 * 4 + 8 + 8 + 16


def decode_peak(text: TextConfig, options: PlanOptions, load: Workload) -> int:
    """One token a sequence: its logits and those of the step before, a row of them in fp32, one block's temporaries."""
    logits = text.vocab_size * (2 * load.rows * options.width + options.wide)
    return logits + load.rows * (5 * text.hidden_size + 4 * text.intermediate_size) * options.width
