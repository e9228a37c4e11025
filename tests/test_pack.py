"""Packed models: bf16 as before, int8 and int4 as a model whose weights are what the packed ones stand for."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from small_model import make_inputs, random_model

from llama_multimodal import ops
from llama_multimodal.errors import ConfigError
from llama_multimodal.models.layers import Linear
from llama_multimodal.ops import Format
from llama_multimodal.quant.pack import PackedLinear, Packing, pack

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
    ("format", "lm_head"), [("int8", "int8"), ("int4", "int8"), ("int4", "int4"), ("bf16", "bf16")]
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


def test_bad_requests() -> None:
    with pytest.raises(ConfigError, match="32 columns cannot be packed as int8 in groups of 24; choose another group"):
        pack(random_model(), Packing("int8", 24))
    with pytest.raises(ConfigError, match="packed already"):
        pack(pack(random_model(), "bf16"), "int8")
