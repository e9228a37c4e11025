"""A decoder's weights as a GGUF file, so that llama.cpp runs the same model.

Shapes: N outputs · K inputs · H heads · D head dim
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llama_multimodal.config import TextConfig
from llama_multimodal.ops import rope_frequencies

Quantize = Callable[[Tensor, str], Tensor]
"""A matrix [N, K] and a format of `ggml.TYPES` → its rows as bytes, uint8."""


def write_gguf(
    file: Path,
    config: TextConfig,
    state: dict[str, Tensor],
    format: str,
    quantize: Quantize,
    lm_head: str | None = None,
) -> None:
    """Write a model without cross-attention and without a tokenizer.

    state: in Hugging Face's names. format: of every matrix, the embedding among them, as llama.cpp's own files have
    it; lm_head: the LM head's, where it differs.
    """
    from ggml import TYPES
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map

    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")  # as many tokens as the line above says, without texts

    writer.add_tensor("rope_freqs.weight", rope_factors(config).numpy())
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for theirs, tensor in state.items():
        name = names.get_name(theirs, try_suffixes=(".weight",))
        assert name is not None, f"llama.cpp has no tensor for {theirs}"
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor.float().numpy())
            continue
        if turned := heads.get(theirs.split(".")[-2]):
            tensor = interleaved_heads(tensor, turned)
        kind = lm_head or format if theirs == head_of(state) else format
        writer.add_tensor(name, quantize(tensor, kind).numpy(), raw_dtype=GGMLQuantizationType(TYPES[kind]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def head_of(state: dict[str, Tensor]) -> str:
    """The LM head's name: the embedding's where it has no table of its own."""
    return "lm_head.weight" if "lm_head.weight" in state else "model.embed_tokens.weight"


def as_stored(weight: Tensor, format: str, quantize: Quantize) -> Tensor:
    """The fp32 values that llama.cpp reads where it stores a matrix in `format`."""
    from ggml import TYPES
    from gguf import GGMLQuantizationType, dequantize

    return torch.from_numpy(dequantize(quantize(weight, format).numpy(), GGMLQuantizationType(TYPES[format])))


def rope_factors(config: TextConfig) -> Tensor:
    """What llama.cpp divides each frequency by, [D/2] fp32: it has Llama 3.1's scaling from the file alone."""
    plain = rope_frequencies(config.head_dim, config.rope_theta, None)
    return plain / rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)


def interleaved_heads(weight: Tensor, heads: int) -> Tensor:
    """Rows [H · D, K], so that rope turns rows 2i and 2i + 1 of a head instead of i and i + D/2."""
    return torch.stack(weight.unflatten(0, (heads, 2, -1)).unbind(1), dim=2).flatten(0, 2)
