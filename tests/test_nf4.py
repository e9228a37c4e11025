"""NF4 weights and adapters over them, against the plain model of the values that they stand for."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from small_model import make_inputs, random_model
from torch import Tensor

from llama_multimodal import LoraConfig, apply_lora, merge_lora, use_adapter
from llama_multimodal.adapters.lora import adapter_pairs, count_parameters, remove_adapter
from llama_multimodal.adapters.targets import places
from llama_multimodal.errors import CheckpointError, ConfigError, MissingExtraError
from llama_multimodal.models import VisionLanguageModel
from llama_multimodal.quant.nf4 import Nf4Config, Nf4Linear, Nf4Weight, quantize_nf4
from llama_multimodal.quant.pack import pack
from llama_multimodal.weights.checkpoint import build_on_meta
from llama_multimodal.weights.save import save_checkpoint

INPUTS = make_inputs([[1, 2, 64, 3, 4, 5], [7, 8, 9]], [[(1, 2)], []])
EXACT = Nf4Config(compute_dtype="float32")
QUANTILES = 16


def nf4_layers(model: VisionLanguageModel) -> dict[str, Nf4Linear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Nf4Linear)}


@torch.no_grad()
def dequantized(model: VisionLanguageModel) -> VisionLanguageModel:
    """A plain fp32 model of the same values."""
    plain = random_model()
    for path, layer in nf4_layers(model).items():
        plain.get_parameter(f"{path}.weight").copy_(layer.dense())
    return plain


def logits(model: VisionLanguageModel) -> Tensor:
    found = model(INPUTS).logits
    return torch.cat([found[row, :length] for row, length in enumerate(INPUTS.lengths)])


@pytest.fixture(scope="module")
def quantized() -> VisionLanguageModel:
    pytest.importorskip("bitsandbytes")
    return quantize_nf4(random_model(), EXACT)  # type: ignore[return-value]


def test_which_layers(quantized: VisionLanguageModel) -> None:
    """All but the projector, the LM head and the patches; norms, gates and embeddings are no linear layers."""
    linear = {path for path, place in places(random_model()).items() if place.group not in ("projector", "lm_head")}
    assert nf4_layers(quantized).keys() == linear and len(linear) == 65
    assert [(p.path, p.shape) for p in places(quantized).values()] == [
        (p.path, p.shape) for p in places(random_model()).values()
    ]
    assert count_parameters(quantized).total == count_parameters(random_model()).total
    other = quantize_nf4(random_model(), Nf4Config(keep=("vision", "mlp", "decoder.layers.0")))
    paths = nf4_layers(other).keys()  # type: ignore[arg-type]
    assert {"projector", "decoder.lm_head", "decoder.layers.1.attention.q_proj"} <= paths
    assert not any(path.startswith(("vision", "decoder.layers.0")) or ".mlp." in path for path in paths)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block_size", [32, 64])
def test_the_values(block_size: int, double: bool) -> None:
    """At most half of the widest gap between quantiles away, and no more than 16 different ones in a block."""
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    layer = Nf4Linear(Nf4Weight.of(weight, block_size, double), None, torch.float32)
    blocks, dense = weight.view(-1, block_size), layer.dense().view(-1, block_size)
    assert ((blocks - dense).abs().amax(1) / blocks.abs().amax(1)).max() < 0.16
    assert all(len(set(block.tolist())) <= QUANTILES for block in dense)
    assert layer.scales.dtype == (torch.uint8 if double else torch.float32)
    assert layer.values.numel() == weight.numel() // 2


def test_logits_are_those_of_the_values(quantized: VisionLanguageModel) -> None:
    plain = dequantized(quantized)
    with torch.no_grad():
        assert (logits(quantized) - logits(plain)).abs().max() < 1e-4
        assert (logits(plain) - logits(random_model())).abs().max() > 1e-2


def test_bf16_products(quantized: VisionLanguageModel) -> None:
    plain = dequantized(quantized).to(torch.bfloat16)
    model = quantize_nf4(random_model(dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert logits(model).dtype == torch.bfloat16  # type: ignore[arg-type]
        assert (logits(model) - logits(plain)).abs().max() < 0.6  # type: ignore[arg-type]


def test_scales_survive_a_conversion(quantized: VisionLanguageModel) -> None:
    model = copy.deepcopy(quantized)
    before = {path: layer.dense() for path, layer in nf4_layers(model).items()}
    model.to(torch.bfloat16).to(torch.float32)
    assert all(torch.equal(layer.dense(), before[path]) for path, layer in nf4_layers(model).items())


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_of_an_adapter_are_those_over_the_plain_values(dora: bool, quantized: VisionLanguageModel) -> None:
    pairs = {}
    for kind, model in (("nf4", copy.deepcopy(quantized)), ("plain", dequantized(quantized))):
        torch.manual_seed(0)
        apply_lora(model, LoraConfig(rank=4, alpha=8, targets="all-linear", dora=dora))
        for pair in adapter_pairs(model, "default").values():
            torch.nn.init.normal_(pair.B, std=0.1)
        logits(model).square().mean().backward()
        pairs[kind] = adapter_pairs(model, "default")
    assert pairs["nf4"].keys() == pairs["plain"].keys() and len(pairs["nf4"]) == 66
    for path, pair in pairs["nf4"].items():
        for mine, theirs in zip(pair.parameters(), pairs["plain"][path].parameters(), strict=True):
            assert mine.grad is not None and theirs.grad is not None
            assert (mine.grad - theirs.grad).abs().max() < 1e-3 * max(1e-2, float(theirs.grad.abs().max())), path


def test_it_trains() -> None:
    """Twenty steps of QLoRA on one batch: bf16 products, fp32 adapters; the base stays as it is."""
    pytest.importorskip("bitsandbytes")
    model: Any = quantize_nf4(random_model(dtype=torch.bfloat16))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    apply_lora(model, LoraConfig(rank=8, alpha=16, targets=("self", "cross", "mlp")))
    trained = [value for value in model.parameters() if value.requires_grad]
    assert {value.dtype for value in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    labels = torch.randint(0, 60, (9,), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(logits(model).float(), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
    with use_adapter(model, None), torch.no_grad():
        plain = logits(model)
    remove_adapter(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(logits(model), plain)


def test_what_is_refused(quantized: VisionLanguageModel, tmp_path: Any) -> None:
    for wrong in ({"block_size": 48}, {"compute_dtype": "int8"}):
        with pytest.raises(ConfigError, match=r"must be one of|is not one of"):
            Nf4Config(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no linear layer is left to quantize"):
        quantize_nf4(copy.deepcopy(quantized), EXACT)
    with pytest.raises(ConfigError, match="built without weights"):
        quantize_nf4(build_on_meta(quantized.config))
    with pytest.raises(ConfigError, match=r"layers were changed \(adapters or NF4\)"):
        pack(copy.deepcopy(quantized), "bf16")
    model = apply_lora(copy.deepcopy(quantized), LoraConfig(targets="self"))
    with pytest.raises(CheckpointError, match="layers were changed by adapters"):
        save_checkpoint(model, tmp_path)
    with pytest.raises(ConfigError, match="packed weights, which would be rounded again"):
        merge_lora(model)


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r'NF4 needs an optional extra: pip install -e "\.\[qlora\]"'):
        quantize_nf4(random_model())
