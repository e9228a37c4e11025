"""NF4 in files: what is saved comes back bit for bit, transformers reads it, and what is damaged is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_for_tests import random_model, same_model
from safetensors.torch import load_file, save_file
from small_model import CONFIG, make_inputs

from llama_multimodal import load
from llama_multimodal.config import LanguageModelConfig
from llama_multimodal.errors import CheckpointError, ConfigError, UserError
from llama_multimodal.models import LanguageModel, build_model
from llama_multimodal.quant.nf4 import Nf4Config, Nf4Linear, quantize_nf4
from llama_multimodal.quantize import quantize_to_nf4
from llama_multimodal.weights.save import save_checkpoint

pytest.importorskip("bitsandbytes")
INPUTS = make_inputs([[1, 2, 3, 4, 5]])
SETTINGS = Nf4Config(block_size=32, compute_dtype="float32")
Q_PROJ = "language_model.model.layers.1.self_attn.q_proj.weight"


def saved(folder: Path, config: Nf4Config = SETTINGS, **options: Any) -> LanguageModel:
    model = quantize_nf4(random_model(), config)
    save_checkpoint(model, folder, **options)
    return model


def nf4_layers(model: LanguageModel) -> dict[str, Nf4Linear]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, Nf4Linear)}


@pytest.mark.parametrize(
    "config",
    [SETTINGS, replace(SETTINGS, double_quant=False), replace(SETTINGS, keep=("vision", "lm_head", "down_proj"))],
    ids=["", "plain scales", "keep"],
)
def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path, config: Nf4Config) -> None:
    model = saved(tmp_path, config)
    again, _ = load(tmp_path)
    assert same_model(again, model)
    layers = nf4_layers(again)
    assert layers.keys() == nf4_layers(model).keys() and len(layers) > 10
    assert all(layer.block_size == 32 and layer.compute_dtype == torch.float32 for layer in layers.values())
    assert torch.equal(again(INPUTS).logits, model(INPUTS).logits)


def test_the_meta_device_and_plain_numbers(tmp_path: Path) -> None:
    model = saved(tmp_path / "nf4")
    meta, _ = load(tmp_path / "nf4", device="meta")
    assert {path: layer.weight.shape for path, layer in nf4_layers(meta).items()} == {
        path: layer.weight.shape for path, layer in nf4_layers(model).items()
    }
    assert all(layer.values.is_meta and layer.block_size == 32 for layer in nf4_layers(meta).values())
    save_checkpoint(model, tmp_path / "plain", unpacked=True)
    plain, _ = load(tmp_path / "plain")
    assert not nf4_layers(plain)
    assert (plain(INPUTS).logits - model(INPUTS).logits).abs().max() < 1e-4


def test_quantize_writes_it(tmp_path: Path) -> None:
    save_checkpoint(random_model(), tmp_path / "plain")
    done = quantize_to_nf4(tmp_path / "plain", tmp_path / "small", SETTINGS)
    again, _ = load(done.folder)
    assert done.bytes_after < done.bytes_before and same_model(again, quantize_nf4(random_model(), SETTINGS))
    with pytest.raises(CheckpointError, match="is quantized already"):
        quantize_to_nf4(done.folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_transformers_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = replace(
        CONFIG.text, cross_attention_layers=(), num_extra_embeddings=0, hidden_size=64, intermediate_size=96,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = build_model(LanguageModelConfig(text))
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.3)
    with torch.no_grad():
        plain = model(INPUTS).logits
    save_checkpoint(quantize_nf4(model, replace(SETTINGS, keep=("lm_head", "layers.0.mlp"))), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert sum(type(layer).__name__ == "Linear4bit" for layer in theirs.modules()) == len(nf4_layers(model)) > 5
    ours, _ = load(tmp_path)
    with torch.no_grad():
        expected = theirs(torch.tensor([[1, 2, 3, 4, 5]])).logits
        logits = ours(INPUTS).logits
    # On a CPU its products are bf16, whatever the dtype.
    assert (logits - expected).norm() < 0.02 * expected.norm() < 0.1 * (plain - expected).norm()


def _state(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, torch.Tensor]], None]:
    def on_files(tensors: dict[str, torch.Tensor]) -> None:
        name = f"{Q_PROJ}.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[name].tolist()))
        change(state)
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return on_files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.quant_map"), f"{Q_PROJ} and what lies beside it are no NF4 weight"),
        (lambda t: t.pop(f"{Q_PROJ}.quant_state.bitsandbytes__nf4"), f"misshaped {Q_PROJ}"),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ][:-1].clone()}), "are no NF4 weight"),
        (lambda t: t[f"{Q_PROJ}.quant_state.bitsandbytes__nf4"].fill_(1), "is damaged; download"),
        (_state(lambda s: s.update(shape=[3, 5])), "is of another weight, or not of NF4"),
        (_state(lambda s: s.update(quant_type="fp4")), "is of another weight, or not of NF4"),
        (_state(lambda s: s.update(blocksize=64)), "scales for blocks of 64"),
        (_state(lambda s: s.pop("nested_offset")), "is damaged; download"),
    ],
)
def test_damaged_files(tmp_path: Path, change: Any, message: str) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("changed", [{"load_in_4bit": False, "load_in_8bit": True}, {"bnb_4bit_quant_type": "fp4"}])
def test_other_formats_of_bitsandbytes_are_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    config["quantization_config"] |= changed
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="by bitsandbytes in another format than NF4"):
        load(tmp_path)
