"""What one training step takes besides the weights: forward, loss through `ops.linear_cross_entropy`, backward, step.

The steps before it have made the optimizer's moments; gradients are set to None between steps. In the backward pass
activations go as gradients come, block by block, so the most is alive at its beginning or at its end. A frozen encoder
runs without gradients; LoRA's adapters lie beside the seven linear layers of each of the decoder's blocks, everything
else is frozen then. The optimizer's step is fused and makes no temporaries.

Letters: E hidden size · F width of the feed-forward block · K width of keys · V vocabulary, all of the decoder; tokens
are those of the whole batch
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import AnyModelConfig, ModelConfig, TextConfig
from .inference import token_overhead, vision_tokens
from .options import DTYPE_BYTES, PlanOptions, Workload
from .parameters import Parameters, block_matrices, block_shapes
from .vision import encoder_saved, num_blocks

_CHUNK_LOGITS = 2**23  # that `linear_cross_entropy` holds at once
_CHUNKS = 3  # logits, their softmax and a temporary, in fp32
_STEPS_AT_ONCE = 256  # numbers of an 8-bit moment that share a scale in fp32


@dataclass(frozen=True)
class Trained:
    """Numbers of parameters that are trained, and their bytes; of the whole model, however it is sharded."""

    parameters: int
    weights: int  # of those alone
    gradients: int
    moments: int
    copies: int  # in the dtype of products, where the weights themselves are wider


def adapters(text: TextConfig, rank: int) -> int:
    """Parameters of LoRA beside every linear layer of the decoder's blocks."""
    return text.num_hidden_layers * rank * sum(inputs + outputs for inputs, outputs in block_shapes(text))


def trained(config: AnyModelConfig, parameters: Parameters, options: PlanOptions) -> Trained:
    """What is trained of a model, or beside it."""
    if options.train == "lora":
        count = adapters(config.text, options.rank)
    else:
        count = parameters.total - (parameters.vision if options.freeze_vision else 0)
    width = DTYPE_BYTES["fp32"] if options.master_weights else options.width
    moments = 2 * count * width
    if options.optimizer == "adamw8bit":
        moments = 2 * (count + count // _STEPS_AT_ONCE * DTYPE_BYTES["fp32"])
    copies = count * options.width if width > options.width else 0
    return Trained(count, count * width, count * width, moments, copies)


def gathered(parameters: Parameters, text: TextConfig, options: PlanOptions) -> int:
    """What a GPU holds of others' weights with sharding: two blocks, since the next one comes while one runs, the
    embedding and the LM head, which stay from the forward to the backward pass; and one block's gradients."""
    block = block_matrices(text)
    blocks = (2 + (options.train == "full")) * block
    return (blocks + parameters.embedding + parameters.lm_head) * options.width


# --- activations -----------------------------------------------------------------------------------------------------


def self_block_saved(text: TextConfig, options: PlanOptions) -> int:
    """Bytes a token that the backward pass of a self-attention block needs.

    Its input, the input's norm, queries, keys, values, the attention's result in two orders, the sum, its norm, gate,
    up and their product. Without kernels also the activated gate, the norms before their weights where those are
    trained, and what a norm read in fp32.
    """
    size, inner, keys = text.hidden_size, text.intermediate_size, text.num_key_value_heads * text.head_dim
    if options.fused:
        numbers = 6 * size + 2 * keys + 3 * inner
    else:
        widened = 2 * (options.wide // options.width - 1)
        numbers = (7 + 2 * (options.train == "full") + widened) * size + 2 * keys + 4 * inner
    return numbers * options.width + _ranks(text, options)


def cross_block_saved(text: TextConfig, options: PlanOptions) -> tuple[int, int]:
    """Bytes a text token, and bytes a vision token, that the backward pass of a gated block needs.

    As in the other block, and: queries and keys before their norms, and what the trained gates are multiplied by.
    """
    size, inner, keys = text.hidden_size, text.intermediate_size, text.num_key_value_heads * text.head_dim
    gates = 2 * (options.train == "full")
    if options.fused:
        numbers, vision = (8 + gates) * size + 3 * inner, 3 * keys
    else:
        norms = options.train == "full"
        wide = options.wide // options.width - 1
        numbers = (8 + 3 * norms + gates + 3 * wide) * size + 4 * inner
        vision = (3 + norms + wide) * keys
    return numbers * options.width + _ranks(text, options), vision * options.width


def _ranks(text: TextConfig, options: PlanOptions) -> int:
    """Bytes a token that adapters keep between their two layers."""
    return len(block_shapes(text)) * options.rank * options.width if options.train == "lora" else 0


def text_saved(config: AnyModelConfig, options: PlanOptions, load: Workload) -> tuple[int, int]:
    """Bytes of what all of the decoder's blocks keep for the backward pass, and of what is alive in a block that runs
    backward besides: the gradients of its gate, up, input and sum, and with checkpointing what it keeps once more."""
    text = config.text
    tokens, seen = load.rows * load.prompt, vision_tokens(config, load)
    cross = len(text.cross_attention_layers) if seen else 0  # blocks without an image to read are passed over
    plain = len(text.self_attention_layers)
    one = tokens * self_block_saved(text, options)
    each, of_vision = cross_block_saved(text, options)
    gated = tokens * each + seen * of_vision
    backward = tokens * 2 * (text.intermediate_size + text.hidden_size) * options.width
    if not options.gradient_checkpointing:
        saved = plain * one + cross * gated
    else:
        saved = (plain + cross) * tokens * text.hidden_size * options.width + cross * seen * of_vision
        backward += max(one, gated if cross else 0)
    return saved + tokens * token_overhead(text), backward


def vision_saved(config: AnyModelConfig, options: PlanOptions, load: Workload) -> int:
    """What the encoder and the projector keep for the backward pass; with a frozen encoder, what is read of it."""
    if not isinstance(config, ModelConfig) or not load.tiles:
        return 0
    projected = vision_tokens(config, load) * config.text.hidden_size * options.width
    if options.train == "lora":
        return projected
    features = load.tiles * config.vision.num_tokens(*load.tile_size) * config.vision.output_size * options.width
    if options.freeze_vision:
        return projected + features
    each, entering = encoder_saved(config.vision, options, load)
    blocks = num_blocks(config.vision)
    saved = blocks * entering + each if options.gradient_checkpointing else blocks * each
    return projected + features + saved


def loss_peak(config: AnyModelConfig, parameters: Parameters, options: PlanOptions, load: Workload) -> int:
    """What the last norm and the loss hold: the norm's input and result, the tokens that count and their gradients,
    a chunk of logits, and the gradient of the LM head in fp32, once more while it is scaled."""
    text = config.text
    tokens = load.rows * load.prompt
    chunk = min(tokens * text.vocab_size, _CHUNK_LOGITS) * options.wide * _CHUNKS
    kept = tokens * 5 * text.hidden_size * options.width
    if options.train == "lora":
        return kept + chunk
    head = text.vocab_size * text.hidden_size
    scaled = head * (2 * options.wide + (options.width if options.width < options.wide else 0))
    return kept + max(chunk + head * (options.wide + options.width), scaled)
