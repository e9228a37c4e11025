"""What one training step takes besides the weights: forward, loss through `ops.linear_cross_entropy`, backward, step.

What is trained lies in fp32, with its gradients and moments, and so does the residual stream then; products run in
`dtype` (autocast). LoRA's frozen model is in `dtype` altogether, and its adapters read their inputs in fp32. The steps
before have made the optimizer's moments; gradients are set to None between steps; the optimizer's step is fused. Every
token is learnt from. A frozen encoder keeps nothing.

In the backward pass activations go as gradients come, block by block, so most is alive at its beginning, when it comes
from the decoder to the encoder, or at its end.

Letters: E hidden size · F width of the feed-forward block · K width of keys · V vocabulary, all of the decoder; tokens
are those of the whole batch
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import AnyModelConfig, ModelConfig, TextConfig
from .inference import token_overhead, vision_tokens
from .options import DTYPE_BYTES, PlanOptions, Workload
from .parameters import Parameters, block_matrices, block_shapes, projector_shapes, vision_shapes
from .vision import encoder_saved, num_blocks

_CHUNK_LOGITS = 2**23  # that `linear_cross_entropy` holds at once
_CHUNKS = 2  # logits and their softmax, in fp32
_SHARE_A_SCALE = 256  # numbers of an 8-bit moment
_ATTENTION_LAYERS = 4  # of a block's linear layers, which come first


@dataclass(frozen=True)
class Trained:
    """Numbers of parameters that are trained, and bytes; of the whole model, however it is sharded."""

    parameters: int
    head: int  # of them the LM head's
    vision: int  # and the encoder's
    weights: int
    moments: int
    copies: int  # in the dtype of products

    @property
    def gradients(self) -> int:
        return self.weights

    @property
    def head_gradient(self) -> int:
        return self.head * DTYPE_BYTES["fp32"]

    @property
    def decoder_gradients(self) -> int:
        """With the projector's: all that are there when the encoder's turn comes."""
        return (self.parameters - self.vision) * DTYPE_BYTES["fp32"]


def trained(config: AnyModelConfig, parameters: Parameters, options: PlanOptions) -> Trained:
    """What is trained of a model, or beside it."""
    text, head, vision = config.text, 0, 0
    if options.train == "lora":
        count = adapters(config, options)
    else:
        blocks = text.num_hidden_layers
        each = (parameters.matrices + parameters.vectors) // max(1, blocks)
        sizes = {
            "vision": parameters.vision,
            "projector": parameters.projector,
            "self": len(text.self_attention_layers) * each,
            "cross": len(text.cross_attention_layers) * each,
            "embedding": parameters.embedding,
            "lm_head": parameters.lm_head,
        }
        count = parameters.total - sum(sizes[part] for part in set(options.freeze))
        vision = 0 if "vision" in options.freeze else parameters.vision
        head = 0 if "lm_head" in options.freeze else text.vocab_size * text.hidden_size
    wide = DTYPE_BYTES["fp32"]
    moments = 2 * count * wide
    if options.optimizer == "adamw8bit":
        moments = 2 * (count + count // _SHARE_A_SCALE * wide)
    copies = count * options.width if options.width < wide and options.train == "full" else 0
    return Trained(count, head, vision, count * wide, moments, copies)


def adapters(config: AnyModelConfig, options: PlanOptions) -> int:
    """Parameters of LoRA beside the layers that it is for: A [rank, inputs] and B [outputs, rank] of each."""
    text = config.text
    sides = [inputs + outputs for inputs, outputs in block_shapes(text)]
    attention, mlp = sum(sides[:_ATTENTION_LAYERS]), sum(sides[_ATTENTION_LAYERS:])
    of_group = {
        "self": len(text.self_attention_layers) * attention,
        "cross": len(text.cross_attention_layers) * attention,
        "mlp": text.num_hidden_layers * mlp,
        "projector": sum(map(sum, projector_shapes(config))),
        "vision": sum(map(sum, vision_shapes(config))),
    }
    return options.rank * sum(of_group[group] for group in set(options.targets))


def gathered(parameters: Parameters, text: TextConfig, options: PlanOptions) -> int:
    """What a GPU holds of others' weights with sharding, in the dtype of products: two blocks, since the next one comes
    while one runs, and embedding, LM head and projector from the forward to the backward pass; and where they are
    trained, one block's gradients and theirs."""
    block, root = block_matrices(text), parameters.embedding + parameters.lm_head + parameters.projector
    gradients = block + root if options.train == "full" else 0
    return (2 * block + root + gradients) * options.width


# --- activations -----------------------------------------------------------------------------------------------------


def self_block_saved(text: TextConfig, options: PlanOptions) -> int:
    """Bytes a token that the backward pass of a self-attention block needs: of two norms, of queries, keys, values and
    the attention's result, of what the linear layers read, and of the feed-forward layer."""
    size, keys = text.hidden_size, text.num_key_value_heads * text.head_dim
    attention = (2 * size + 2 * keys) * options.width
    return 2 * _norm(size, options) + attention + _inputs(text, options, "self") + _feed_forward(text, options)


def cross_block_saved(text: TextConfig, options: PlanOptions) -> tuple[int, int]:
    """Bytes a text token, and bytes a vision token, that the backward pass of a gated block needs: as in the other
    block, the norms of queries and keys, and what trained gates are multiplied by."""
    size, keys = text.hidden_size, text.num_key_value_heads * text.head_dim
    gates = 2 * size * options.width if options.train == "full" else 0
    text_side = 3 * _norm(size, options) + 2 * size * options.width + _inputs(text, options, "cross") + gates
    return text_side + _feed_forward(text, options), _norm(keys, options) + 2 * keys * options.width


def _norm(size: int, options: PlanOptions) -> int:
    """A kernel keeps the norm's input; torch keeps it in fp32, and what a trained weight is multiplied by."""
    full = options.train == "full"
    if options.fused:
        return size * (options.wide if full else options.width)
    return size * options.wide * (1 + full)


def _inputs(text: TextConfig, options: PlanOptions, attention: str) -> int:
    """What a block's linear layers read, but for the last of them: the norms' results and the attention's, which torch
    brings into another order. Where products are narrower than the residual stream, each layer keeps a copy of its own.
    So do adapters, in fp32, and what lies between their two layers."""
    size, narrow = text.hidden_size, options.width < options.wide
    if options.train == "full":
        copies = 5 if narrow and attention == "self" else 2  # of q, k, v, gate and up
        return (copies + 1 - options.fused) * size * options.width
    numbers = 0
    if attention in options.targets:
        numbers += ((3 if narrow else 1) + 1) * size + _ATTENTION_LAYERS * options.rank
    if "mlp" in options.targets:
        numbers += (2 if narrow else 1) * size + (len(block_shapes(text)) - _ATTENTION_LAYERS) * options.rank
    return numbers * options.wide


def _feed_forward(text: TextConfig, options: PlanOptions) -> int:
    """Gate and up; without a kernel the activated gate; their product, where a trained layer reads it."""
    read = options.width if options.train == "full" else options.wide * ("mlp" in options.targets)
    return text.intermediate_size * ((2 if options.fused else 3) * options.width + read)


def text_saved(config: AnyModelConfig, options: PlanOptions, load: Workload) -> tuple[int, int]:
    """Bytes of what all of the decoder's blocks keep for the backward pass, and of what is alive in a block that runs
    backward besides: the gradients of its gate, up, input and sum, and with checkpointing what it keeps once more."""
    text = config.text
    tokens, seen = load.rows * load.prompt, vision_tokens(config, load)
    cross = len(text.cross_attention_layers) if seen else 0  # blocks without an image to read are passed over
    plain = len(text.self_attention_layers)
    residual = options.wide if options.train == "full" else options.width
    one = tokens * self_block_saved(text, options)
    each, of_vision = cross_block_saved(text, options)
    gated = tokens * each + seen * of_vision
    widest = options.width if options.train == "full" else options.wide
    backward = tokens * 2 * (text.intermediate_size * widest + text.hidden_size * residual)
    if not options.gradient_checkpointing:
        saved = plain * one + cross * gated
    else:
        saved = (plain + cross) * tokens * text.hidden_size * residual + cross * seen * of_vision
        backward += max(one, gated if cross else 0)
    if options.pack is not None and options.pack.format == "nf4":  # one matrix at a time, forward and backward
        saved += max(inputs * outputs for inputs, outputs in block_shapes(text)) * options.width
    elif options.pack is not None:  # unpacked for a product, whose backward pass reads them again
        blocks = 1 if options.gradient_checkpointing else text.num_hidden_layers
        saved += blocks * block_matrices(text) * options.width
    return saved + tokens * token_overhead(text), backward


def vision_saved(config: AnyModelConfig, options: PlanOptions, load: Workload) -> int:
    """What the encoder and the projector keep for the backward pass, and the projected features, which are read by
    the decoder."""
    if not isinstance(config, ModelConfig) or not load.tiles:
        return 0
    projected = vision_tokens(config, load) * config.text.hidden_size * options.width
    values = load.tiles * config.vision.num_tokens(*load.tile_size) * config.vision.output_size
    adapted = set(options.targets) & {"vision", "projector"} if options.train == "lora" else set()
    if options.train == "lora" and not adapted:
        return projected
    features = values * (options.wide if "projector" in adapted else options.width)  # adapters read them in fp32
    if "vision" in options.freeze or adapted == {"projector"}:
        return projected + features
    each, entering = encoder_saved(config.vision, options, load)
    blocks = num_blocks(config.vision)
    if adapted:  # what each of a block's layers reads, in fp32: its inputs, the attention's result, the hidden values
        vision: Any = config.vision
        each += entering // vision.hidden_size * (5 * vision.hidden_size + vision.intermediate_size)
    saved = blocks * entering + each if options.gradient_checkpointing else blocks * each
    return projected + features + saved


def loss_peak(config: AnyModelConfig, learnt: Trained, options: PlanOptions, load: Workload) -> int:
    """What the last norm and the loss hold: the norm's input and result, the tokens that count and their gradients, a
    chunk of logits; and of a trained LM head a copy in the products' dtype, its gradient in fp32, and that once more,
    scaled, and in the weight's dtype."""
    text = config.text
    tokens = load.rows * load.prompt
    chunk = min(tokens * text.vocab_size, _CHUNK_LOGITS) * options.wide * _CHUNKS
    kept = _norm(text.hidden_size, options) + 3 * text.hidden_size * options.width
    narrow = options.width if options.width < options.wide else 0
    adding = chunk + learnt.head * (narrow + options.wide + options.width)
    scaling = learnt.head * (narrow + 2 * options.wide + narrow)
    return tokens * kept + max(adding, scaling)
