"""Where Llama 3.2 Vision's parameters lie in Hugging Face's and in Meta's checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..config import ModelConfig
from ..errors import CheckpointError
from .llama import decoder_rules
from .rules import Rename, Rule, TileGrid, interleave, renames, reshape, split_rows

# --- Hugging Face ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HFNames:
    """Prefixes of one generation of names."""

    text: str
    lm_head: str
    vision: str
    projector: str


HF_RELEASED = HFNames("language_model.model", "language_model.lm_head", "vision_model", "multi_modal_projector")
"""The released files, transformers 4.45, and what every later version writes and reads."""
HF_INTERNAL = HFNames("model.language_model", "lm_head", "model.vision_model", "model.multi_modal_projector")
"""The module names of transformers 4.52 and later, as a plain `state_dict()` has them."""

_HF_VISION_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention_norm.bias": "input_layernorm.bias",
    "attention.q_proj.weight": "self_attn.q_proj.weight",
    "attention.k_proj.weight": "self_attn.k_proj.weight",
    "attention.v_proj.weight": "self_attn.v_proj.weight",
    "attention.o_proj.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp_norm.bias": "post_attention_layernorm.bias",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
}
_HF_VISION_GATES = {"attention_gate": "gate_attn", "mlp_gate": "gate_ffn"}
_HF_CROSS_ATTENTION = {
    **{f"attention.{x}_proj.weight": f"cross_attn.{x}_proj.weight" for x in "qo"},
    **{f"attention.kv.{x}_proj.weight": f"cross_attn.{x}_proj.weight" for x in "kv"},
    "attention.q_norm.weight": "cross_attn.q_norm.weight",
    "attention.k_norm.weight": "cross_attn.k_norm.weight",
    "attention_gate": "cross_attn_attn_gate",
    "mlp_gate": "cross_attn_mlp_gate",
}


def hf_names(keys: Iterable[str]) -> HFNames:
    """The generation of names that a checkpoint uses."""
    return HF_INTERNAL if any(key.startswith("model.language_model.") for key in keys) else HF_RELEASED


def hf_rules(config: ModelConfig, names: HFNames = HF_RELEASED) -> list[Rule]:
    """Every parameter's place in Hugging Face's layout."""
    v, ratios = config.tiled, len(config.tiled.aspect_ratios) + 1

    def rules() -> Iterator[Rule]:
        yield from decoder_rules(config.text, names.text, names.lm_head, _HF_CROSS_ATTENTION)
        yield Rename("projector.weight", (f"{names.projector}.weight",))
        yield Rename("projector.bias", (f"{names.projector}.bias",))
        pixels = (v.hidden_size, v.num_channels, v.patch_size, v.patch_size)
        yield Rename("vision.patch_embedding.weight", (f"{names.vision}.patch_embedding.weight",), reshape(*pixels))
        yield from renames(
            "vision",
            names.vision,
            {
                "class_embedding": "class_embedding",
                "position_embedding": "gated_positional_embedding.embedding",
                "position_gate": "gated_positional_embedding.gate",
                "pre_tile_gate": "pre_tile_positional_embedding.gate",
                "post_tile_gate": "post_tile_positional_embedding.gate",
                "pre_norm.weight": "layernorm_pre.weight",
                "pre_norm.bias": "layernorm_pre.bias",
                "post_norm.weight": "layernorm_post.weight",
                "post_norm.bias": "layernorm_post.bias",
            },
        )
        for ours, theirs in (
            ("tile_position_embedding", "gated_positional_embedding.tile_embedding.weight"),
            ("pre_tile_embedding", "pre_tile_positional_embedding.embedding.weight"),
            ("post_tile_embedding", "post_tile_positional_embedding.embedding.weight"),
        ):
            yield Rename(f"vision.{ours}", (f"{names.vision}.{theirs}",), reshape(ratios, -1))
        for i in range(v.num_hidden_layers):
            yield from renames(f"vision.layers.{i}", f"{names.vision}.transformer.layers.{i}", _HF_VISION_BLOCK)
        for i in range(v.num_global_layers):
            block = _HF_VISION_BLOCK | _HF_VISION_GATES
            yield from renames(f"vision.global_layers.{i}", f"{names.vision}.global_transformer.layers.{i}", block)

    return list(rules())


# --- Meta ------------------------------------------------------------------------------------------------------------

ENCODER = "vision_model.vision_encoder"
_META_VISION_BLOCK = {
    "attention_norm.weight": "ln_1.weight",
    "attention_norm.bias": "ln_1.bias",
    "attention.q_proj.weight": "attn.wq.weight",
    "attention.k_proj.weight": "attn.wk.weight",
    "attention.v_proj.weight": "attn.wv.weight",
    "attention.o_proj.weight": "attn.wo.weight",
    "mlp_norm.weight": "ln_2.weight",
    "mlp_norm.bias": "ln_2.bias",
    "mlp.fc1.weight": "mlp.c_fc.weight",
    "mlp.fc1.bias": "mlp.c_fc.bias",
    "mlp.fc2.weight": "mlp.c_proj.weight",
    "mlp.fc2.bias": "mlp.c_proj.bias",
}
_META_VISION_GATES = {"attention_gate": "gate_attn", "mlp_gate": "gate_ffn"}
_META_TEXT_BLOCK = {
    "input_norm.weight": "attention_norm.weight",
    "post_attention_norm.weight": "ffn_norm.weight",
    "mlp.gate_up.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.gate_up.up_proj.weight": "feed_forward.w3.weight",
    "attention.o_proj.weight": "attention.wo.weight",
}
_META_SELF_ATTENTION = {"attention.qkv.v_proj.weight": "attention.wv.weight"}  # the rows of q and k lie otherwise
_META_CROSS_ATTENTION = {  # no rotary positions, so queries and keys are as ours
    "attention.q_proj.weight": "attention.wq.weight",
    "attention.kv.k_proj.weight": "attention.wk.weight",
    "attention.kv.v_proj.weight": "attention.wv.weight",
    "attention.q_norm.weight": "attention.q_norm.weight",
    "attention.k_norm.weight": "attention.k_norm.weight",
    "attention_gate": "gate_attn",
    "mlp_gate": "gate_ffwd",
}

META_IGNORED = ("text_model.rope.freqs", "rope.freqs")
"""Tensors that Meta's files may carry and no model needs."""


def meta_cross_attention_layers(num_self: int, num_cross: int) -> tuple[int, ...]:
    """Places of the cross-attention blocks among all blocks: Meta spreads them evenly, from the last layer down."""
    step = math.ceil(num_self / num_cross) if num_cross else 1
    before = list(range(num_self))[::-1][::step][:num_cross][::-1]  # the self-attention layer that each precedes
    return tuple(layer + i for i, layer in enumerate(before))


def meta_rules(config: ModelConfig) -> list[Rule]:
    """Every parameter's place in Meta's layout.

    Raises:
        CheckpointError: the cross-attention blocks do not lie where Meta's layout has them.
    """
    text, v = config.text, config.tiled
    selves, crosses = text.self_attention_layers, text.cross_attention_layers
    fixed = meta_cross_attention_layers(len(selves), len(crosses))
    if crosses != fixed:
        raise CheckpointError(
            f"cross-attention layers {list(crosses)} cannot be stored in Meta's layout, which fixes them at"
            f" {list(fixed)}; keep this model in the Hugging Face layout"
        )

    def rules() -> Iterator[Rule]:
        tables = ("text_model.tok_embeddings.weight", "text_model.learnable_embedding.weight")
        rows = split_rows(text.vocab_size, text.num_extra_embeddings)
        yield Rename("decoder.embedding.weight", tables, rows)
        for n, i in enumerate(selves):
            ours, theirs = f"decoder.layers.{i}", f"text_model.layers.{n}"
            yield from renames(ours, theirs, _META_TEXT_BLOCK | _META_SELF_ATTENTION)
            for name, heads in (("q", text.num_attention_heads), ("k", text.num_key_value_heads)):
                place = (f"{theirs}.attention.w{name}.weight",)
                yield Rename(f"{ours}.attention.qkv.{name}_proj.weight", place, interleave(heads), reshaped=True)
        for n, i in enumerate(crosses):
            block = _META_TEXT_BLOCK | _META_CROSS_ATTENTION
            yield from renames(f"decoder.layers.{i}", f"text_model.cross_attention_layers.{n}", block)
        yield Rename("decoder.norm.weight", ("text_model.norm.weight",))
        yield Rename("decoder.lm_head.weight", ("text_model.output.weight",))
        yield Rename("projector.weight", ("vision_model.vision_projection.weight",))
        yield Rename("projector.bias", ("vision_model.vision_projection.bias",))
        yield from renames(
            "vision",
            ENCODER,
            {
                "patch_embedding.weight": "conv1._linear.weight",
                "class_embedding": "class_embedding",
                "position_embedding": "positional_embedding",
                "position_gate": "gated_positional_embedding_gate",
                "pre_tile_gate": "pre_tile_pos_embed.gate",
                "post_tile_gate": "post_tile_pos_embed.gate",
                "pre_norm.weight": "ln_pre.weight",
                "pre_norm.bias": "ln_pre.bias",
                "post_norm.weight": "ln_post.weight",
                "post_norm.bias": "ln_post.bias",
            },
        )
        for ours, theirs, middle in (
            ("tile_position_embedding", "gated_positional_embedding", False),
            ("pre_tile_embedding", "pre_tile_pos_embed.embedding", True),
            ("post_tile_embedding", "post_tile_pos_embed.embedding", True),
        ):
            place = (f"{ENCODER}.{theirs}",)
            yield TileGrid(f"vision.{ours}", place, v.aspect_ratios, v.max_num_tiles, middle)
        for i in range(v.num_hidden_layers):
            yield from renames(f"vision.layers.{i}", f"{ENCODER}.transformer.resblocks.{i}", _META_VISION_BLOCK)
        for i in range(v.num_global_layers):
            block = _META_VISION_BLOCK | _META_VISION_GATES
            yield from renames(f"vision.global_layers.{i}", f"{ENCODER}.global_transformer.resblocks.{i}", block)

    return list(rules())


_META_ROWS = (
    "wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "c_fc.weight", "c_fc.bias", "conv1._linear.weight",
    "vision_projection.weight", "vision_projection.bias", "tok_embeddings.weight", "learnable_embedding.weight",
    "output.weight",
)  # fmt: skip
_META_COLUMNS = ("wo.weight", "w2.weight", "c_proj.weight")


def meta_shard_axis(name: str) -> int | None:
    """The axis along which model-parallel shards cut a tensor; None where each shard holds it whole."""
    if name.endswith(_META_ROWS):
        return 0
    return 1 if name.endswith(_META_COLUMNS) else None
