"""Packed models: bf16 as before, int8 and int4 as a model whose weights are what the packed ones stand for."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_model import CONFIG, make_inputs, random_model

from llama_multimodal import load, ops
from llama_multimodal.errors import ConfigError
from llama_multimodal.models import VisionLanguageModel
from llama_multimodal.models.layers import Linear
from llama_multimodal.models.llama import SelfAttentionBlock
from llama_multimodal.ops import Format
from llama_multimodal.quant.pack import PackedLinear, Packing, pack, packable_layers, use_int8_activations
from llama_multimodal.weights.save import save_checkpoint

WIDER = replace(CONFIG, text=replace(CONFIG.text, intermediate_size=64))  # whole groups of 32 everywhere
INPUTS = make_inputs([[1, 2, 64, 3, 4, 5], [7, 8, 9], [64, 64, 5]], [[(1, 2)], [], [(1, 1), (2, 2)]])


@torch.no_grad()
def rounded(format: Format, group: int, symmetric: bool, lm_head: Format) -> torch.Tensor:
    """Logits of a plain model with every packed layer's weight rounded as packing rounds it."""
    model = random_model()
    for name, layer in model.decoder.named_modules():
        if isinstance(layer, Linear):
            chosen = lm_head if name == "lm_head" else format
            layer.weight.copy_(
                ops.unpack_weight(ops.pack_weight(layer.weight, chosen, group=group, symmetric=symmetric))
            )
    return model(INPUTS).logits


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("format", "lm_head"), [("int8", "int8"), ("int4", "int8"), ("int4", "int4"), ("bf16", "bf16"), ("fp8", "fp8")]
)
def test_packed_logits_are_those_of_the_rounded_weights(format: Format, lm_head: Format, symmetric: bool) -> None:
    packed = pack(random_model(), Packing(format, 16, symmetric, lm_head))
    expected = rounded(format, 16, symmetric, lm_head)
    for row, length in enumerate(INPUTS.lengths):
        assert (packed(INPUTS).logits[row, :length] - expected[row, :length]).abs().max() < 1e-4
    assert (expected - random_model()(INPUTS).logits).abs().max() > 1e-3  # the rounding shows


def test_bf16_packing_changes_no_bit_of_a_bf16_model() -> None:
    model = random_model(dtype=torch.bfloat16)
    with ops.use_backend("torch"):
        before = model(INPUTS).logits
        assert torch.equal(pack(model, "bf16")(INPUTS).logits, before)


def test_every_layer_of_the_decoder_is_packed_and_nothing_else() -> None:
    model = pack(random_model(), Packing("int8", 16))
    block = model.decoder.layers[0]
    assert block.attention.qkv.parts == {"q_proj": 32, "k_proj": 16, "v_proj": 16}
    assert block.mlp.gate_up.parts == {"gate_proj": 48, "up_proj": 48}
    assert not any(isinstance(module, Linear) for module in model.decoder.modules())
    assert not any(isinstance(module, PackedLinear) for module in (*model.vision.modules(), model.projector))
    assert isinstance(copy.deepcopy(model).decoder.lm_head, PackedLinear)


def test_plain_weights_are_freed() -> None:
    model = random_model()
    plain = weakref.ref(model.decoder.layers[0].mlp.down_proj.weight)
    pack(model, Packing("int4", 16))
    gc.collect()
    assert plain() is None


@pytest.mark.parametrize(
    ("glob", "kept"),
    [
        ("lm_head", {"lm_head"}),
        ("decoder.layers.0.attention.o_proj", {"layers.0.attention.o_proj"}),
        ("layers.1.cross_attention.*", {f"layers.1.attention.{name}" for name in ("q_proj", "kv", "o_proj")}),
        ("up_proj", {f"layers.{i}.mlp.gate_up" for i in range(5)}),  # runs with the gate, so both stay
    ],
)
def test_layers_that_are_kept(glob: str, kept: set[str]) -> None:
    model = pack(random_model(), Packing("int8", 16, keep=(glob,)))
    stay = {path for path in packable_layers(random_model()) if path.removeprefix("decoder.") in kept}
    assert len(stay) == len(kept)
    for path in packable_layers(random_model()):
        assert isinstance(model.get_submodule(path), PackedLinear) != (path in stay)
    assert torch.isfinite(model(INPUTS).logits).all()


def test_bad_requests() -> None:
    with pytest.raises(ConfigError, match="no layer is called "):
        pack(random_model(), Packing("int8", 16, keep=("lm_heads",)))
    with pytest.raises(ConfigError, match="no file holds fp8 and whole numbers"):
        Packing("fp8", lm_head="int8")
    with pytest.raises(ConfigError, match="groups of 24 do not divide the 32 inputs of layers"):
        pack(random_model(), Packing("int8", 24))
    with pytest.raises(ConfigError, match="packed already"):
        pack(pack(random_model(), "bf16"), "int8")


# --- 8-bit activations -----------------------------------------------------------------------------------------------


def real_logits(model: VisionLanguageModel) -> torch.Tensor:
    """Without the padding: [tokens, vocab]"""
    with torch.no_grad():
        logits = model(INPUTS).logits
    return torch.cat([logits[row, :length] for row, length in enumerate(INPUTS.lengths)])


def with_8_bits(model: VisionLanguageModel) -> set[str]:
    return {name for name, x in model.named_modules() if isinstance(x, PackedLinear) and x.int8_activations}


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("lm_head", ["bf16", "int8"])
def test_8_bit_activations_are_the_rounded_inputs_of_the_packed_layers(format: Format, lm_head: Format) -> None:
    model = pack(random_model(config=WIDER), Packing(format, 32, lm_head=lm_head))
    before = real_logits(model)
    ours = real_logits(use_int8_activations(model))
    plain = random_model(config=WIDER)
    for name, layer in plain.decoder.named_modules():
        if isinstance(layer, Linear):
            chosen = lm_head if name == "lm_head" else format
            layer.weight.data = ops.unpack_weight(ops.pack_weight(layer.weight.detach(), chosen))
            if chosen != "bf16":
                layer.register_forward_pre_hook(lambda _, given: (ops.round_activations(given[0]),))
    # Where sums differ in their last bit, a value between two steps may fall to either: that moves logits by 0.003.
    assert (ours - real_logits(plain)).abs().max() < 6e-3 < 3e-2 < (ours - before).abs().max()
    with ops.use_backend("torch"):
        assert (ours - real_logits(model)).abs().max() < 6e-3


def test_a_block_as_decoding_takes_it_is_kept_until_something_of_it_is_replaced() -> None:
    block = next(layer for layer in random_model().decoder.layers if isinstance(layer, SelfAttentionBlock))
    assert block.packed() is None
    model = pack(random_model(config=WIDER), "int8")
    block = next(layer for layer in model.decoder.layers if isinstance(layer, SelfAttentionBlock))
    first = block.packed()
    assert first is not None and block.packed() is first
    use_int8_activations(model)
    second = block.packed()
    assert second is not None and second.qkv.int8_activations and block.packed() is second
    block.input_norm.weight = torch.nn.Parameter(torch.ones_like(block.input_norm.weight))
    third = block.packed()
    assert third is not None and third.input_norm is block.input_norm.weight
    gone = weakref.ref(third)
    del third
    model.to("meta")
    assert gone() is None  # what has moved is not held here too
    assert (moved := block.packed()) is not None and moved.qkv.weight.values.is_meta
    hook = block.register_forward_hook(lambda *_: None)
    assert block.packed() is None  # whoever listens hears every step
    hook.remove()
    assert block.packed() is not None
    block.mlp.down_proj = Linear(64, 32, bias=False)
    assert block.packed() is None


def test_8_bit_activations_are_refused_where_they_do_not_go() -> None:
    for model in (random_model(), pack(random_model(), "bf16"), pack(random_model(), "fp8")):
        with pytest.raises(ConfigError, match="go with int8 or int4 weights, which the model lacks; pack it as one"):
            use_int8_activations(model)
    model = pack(random_model(), Packing("int4", 16, lm_head="bf16"))
    with pytest.raises(ConfigError, match="take groups of a multiple of 32, not 16; pack it so"):
        use_int8_activations(model)
    assert not with_8_bits(model)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_loading_with_8_bit_activations(tmp_path: Path, device: str) -> None:
    save_checkpoint(random_model(config=WIDER), tmp_path)
    model, _ = load(tmp_path, device=device, pack="int8", int8_activations=True)
    layers = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert len(layers) == 3 * 4 + 2 * 5 + 1 and with_8_bits(model) == layers
    model, _ = load(tmp_path, device=device, pack=Packing("int4", lm_head="bf16"), int8_activations=True)
    assert with_8_bits(model) == layers - {"decoder.lm_head"}
    with pytest.raises(ConfigError, match="go with int8 or int4 weights"):
        load(tmp_path, device=device, int8_activations=True)


def test_files_do_not_hold_8_bit_activations(tmp_path: Path) -> None:
    model = use_int8_activations(pack(random_model(config=WIDER), "int8"))
    save_checkpoint(model, tmp_path)
    again, _ = load(tmp_path)
    assert with_8_bits(model) and not with_8_bits(again)
    assert not torch.equal(real_logits(again), real_logits(model))
    assert torch.equal(real_logits(use_int8_activations(again)), real_logits(model))
