"""Where a Llama decoder's parameters lie in Hugging Face's checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..config import LanguageModelConfig, TextConfig
from .rules import Rename, Rule, renames

_HF_TEXT_BLOCK = {
    "input_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate_up.gate_proj.weight": "mlp.gate_proj.weight",
    "mlp.gate_up.up_proj.weight": "mlp.up_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
}
_HF_SELF_ATTENTION = {
    "attention.o_proj.weight": "self_attn.o_proj.weight",
    **{f"attention.qkv.{x}_proj.weight": f"self_attn.{x}_proj.weight" for x in "qkv"},
}


def llama_rules(config: LanguageModelConfig) -> list[Rule]:
    """Every parameter's place in a checkpoint of the decoder alone."""
    return list(decoder_rules(config.text, "model", "lm_head"))


def decoder_rules(
    config: TextConfig, prefix: str, lm_head: str, cross_attention: Mapping[str, str] | None = None
) -> Iterator[Rule]:
    """Every parameter of the decoder; a tied LM head has none of its own.

    prefix, lm_head: what their names begin with. cross_attention: our names in a gated block, and theirs.
    """
    yield Rename("decoder.embedding.weight", (f"{prefix}.embed_tokens.weight",))
    for i in range(config.num_hidden_layers):
        attention = _HF_SELF_ATTENTION
        if i in config.cross_attention_layers:
            assert cross_attention is not None
            attention = dict(cross_attention)
        yield from renames(f"decoder.layers.{i}", f"{prefix}.layers.{i}", _HF_TEXT_BLOCK | attention)
    yield Rename("decoder.norm.weight", (f"{prefix}.norm.weight",))
    if not config.tie_word_embeddings:
        yield Rename("decoder.lm_head.weight", (f"{lm_head}.weight",))
