"""Llama text models against transformers on checkpoints that it wrote: logits, greedy tokens, both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llama_multimodal as lmm
from llama_multimodal.config import LanguageModelConfig, LinearRopeScaling, RopeScaling
from llama_multimodal.models import LanguageModel
from llama_multimodal.quant.pack import Packing
from llama_multimodal.weights.save import save_checkpoint

transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "Llama 2": {"num_key_value_heads": 4},  # TinyLlama with fewer key heads, Vicuna
    "Llama 3.1": {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}},
    "Llama 3.2": {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}, "tie_word_embeddings": True},
    "SmolLM2": {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 100000.0}},
    "Vicuna 16k": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}},
}
ROWS = [[1, 5, 9, 60, 3, 3, 17, 44, 20, 8, 71, 2, 40], [1, 30, 31], [1, 6, 7, 8, 90, 91]]


def peer(kind: str, folder: Path) -> Any:
    """A tiny random checkpoint of a kind, written to `folder`, and the model that wrote it."""
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, **KINDS[kind],
        }
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_tokens(kind: str, tmp_path: Path) -> None:
    theirs = peer(kind, tmp_path)
    model, processor = lmm.load(tmp_path, dtype=torch.float32)
    assert type(model) is LanguageModel
    inputs = processor.encode_tokens(ROWS)
    logits = model(inputs).logits
    for b, row in enumerate(ROWS):
        with torch.inference_mode():
            expected = theirs(torch.tensor([row])).logits[0]
        assert (logits[b, : len(row)] - expected).abs().max() < 1e-4
    answers = lmm.generate(model, inputs, lmm.SamplingParams(max_new_tokens=24)).token_ids
    for row, answer in zip(ROWS, answers):
        whole = theirs.generate(torch.tensor([row]), max_new_tokens=24, do_sample=False)[0].tolist()
        assert answer == whole[len(row) : len(row) + len(answer)] and len(answer) >= len(whole) - len(row)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_is_saved(kind: str, tmp_path: Path) -> None:
    theirs = peer(kind, tmp_path / "theirs")
    model, _ = lmm.load(tmp_path / "theirs", dtype=torch.float32)
    save_checkpoint(model, tmp_path / "ours")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tokens = torch.tensor(ROWS[:1])
    with torch.inference_mode():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    assert lmm.load(tmp_path / "ours", device="meta")[0].config == model.config


@pytest.mark.parametrize("kind", ["Llama 3.1", "SmolLM2"])
def test_packed(kind: str, tmp_path: Path) -> None:
    """A tied LM head is packed from the embedding, which stays as it is; files hold the embedding only."""
    peer(kind, tmp_path / "theirs")
    model, processor = lmm.load(tmp_path / "theirs", dtype=torch.float32)
    packed, _ = lmm.load(tmp_path / "theirs", dtype=torch.float32, pack=Packing("int8", group=16))
    inputs = processor.encode_tokens(ROWS)
    logits, rounded = model(inputs).logits, packed(inputs).logits
    assert 0 < (logits - rounded).abs().max() < 0.5
    assert torch.equal(packed.decoder.embedding.weight, model.decoder.embedding.weight)
    save_checkpoint(packed, tmp_path / "packed")
    again, _ = lmm.load(tmp_path / "packed", dtype=torch.float32)
    if packed.config.text.tie_word_embeddings:
        packed.decoder.lm_head = again.decoder.lm_head
        assert again.decoder.lm_head.weight is again.decoder.embedding.weight
    assert torch.equal(again(inputs).logits, packed(inputs).logits)


def test_what_the_configuration_becomes(tmp_path: Path) -> None:
    scalings = {}
    for kind in KINDS:
        peer(kind, tmp_path / kind)
        config = lmm.load(tmp_path / kind, device="meta")[0].config
        assert isinstance(config, LanguageModelConfig) and config.text.cross_attention_layers == ()
        assert config.text.tie_word_embeddings == KINDS[kind].get("tie_word_embeddings", False)
        scalings[kind] = config.text.rope_scaling
    assert scalings["Llama 3.1"] == scalings["Llama 3.2"] == RopeScaling(4.0, 1.0, 4.0, 16)
    assert scalings["Vicuna 16k"] == LinearRopeScaling(4.0) and scalings["SmolLM2"] is None


def test_a_tied_embedding_stored_twice(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    peer("SmolLM2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    expected = lmm.load(tmp_path, dtype=torch.float32)[0].decoder.lm_head.weight
    save_file(tensors, tmp_path / "model.safetensors")
    model, _ = lmm.load(tmp_path, dtype=torch.float32)
    assert model.decoder.lm_head.weight is model.decoder.embedding.weight
    assert torch.equal(model.decoder.lm_head.weight, expected)


def test_an_lm_head_beside_a_tied_embedding_is_dropped(tmp_path: Path) -> None:
    change_config(tmp_path, {"tie_word_embeddings": True})
    model, _ = lmm.load(tmp_path, dtype=torch.float32)
    assert model.decoder.lm_head.weight is model.decoder.embedding.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True; this model needs False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"head_dim": 16}, "head_dim is 16; this model needs 12"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, 'rope type "yarn" is not implemented; supported: '),
        ({"model_type": "mistral"}, 'model_type "mistral"; supported: mllama, llama'),
        ({"sliding_windows": 5}, 'unknown key "sliding_windows"'),
        ({"cross_attention_layers": [1]}, "cross-attention layers need a vision encoder"),
        ({"quantization_config": {"quant_method": "gptq"}}, 'quantized as "gptq"'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configurations_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    change_config(tmp_path, change)
    with pytest.raises(lmm.UserError, match=message):
        lmm.load(tmp_path)


def change_config(folder: Path, change: dict[str, Any]) -> None:
    """A checkpoint of a kind in `folder`, with other values in its config.json."""
    peer("Llama 3.1", folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def test_pictures_are_refused(tmp_path: Path) -> None:
    peer("Llama 2", tmp_path)
    _, processor = lmm.load(tmp_path)
    with pytest.raises(lmm.UserError, match="reads text only; leave the images out"):
        processor.encode_tokens([[1, 2]], [["picture.png"]])
