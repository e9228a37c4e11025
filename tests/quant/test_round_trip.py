"""What rounding a weight loses, value by value, against bounds from the range of its group."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.ops import Format
from llama_multimodal.quant.pack import Packing, bytes_of
from llama_multimodal.weights.rules import same_bits

packed_linear = sys.modules["llama_multimodal.ops.packed_linear"]  # `ops.packed_linear` is the function
_HALF = 0.5 + 1e-3  # of a step; scales are rounded to fp16, which cuts the outermost values off by this much at most


def weight_of(rows: int, columns: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(rows, 1, generator=generator) * 0.1 + 0.01
    return torch.randn(rows, columns, generator=generator) * scales + shift


@pytest.mark.parametrize("shift", [0.0, 0.05])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize(("format", "steps", "sides"), [("int8", 255, 127), ("int4", 15, 7)])
def test_whole_numbers(format: Format, steps: int, sides: int, group: int, symmetric: bool, shift: float) -> None:
    weight = weight_of(24, 256, shift)
    packed = ops.pack_weight(weight, format, group=group, symmetric=symmetric)
    groups = weight.view(24, -1, group)
    if symmetric:
        step = groups.abs().amax(-1, keepdim=True) / sides
        off = _HALF * step
    else:  # the zero is a whole number of steps, so either end may be cut off by half a step more
        step = (groups.amax(-1, keepdim=True).clamp(min=0) - groups.amin(-1, keepdim=True).clamp(max=0)) / steps
        off = (1 + 1e-3) * step
    off = off + steps * step * 2.0**-11  # the scale itself, in fp16
    assert ((ops.unpack_weight(packed).view_as(groups) - groups).abs() <= off).all()
    assert packed.nbytes == bytes_of(24, 256, Packing(format, group, symmetric), "")


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_asymmetric_zeros_are_exact(format: Format) -> None:
    """A zero is stored as the zero point and comes back as 0, and so do groups that lie on one side of zero."""
    weight = weight_of(8, 64).abs()
    weight[:, ::5] = 0
    weight[4:] *= -1
    packed = ops.pack_weight(weight, format, group=32, symmetric=False)
    assert packed.zeros is not None
    back = ops.unpack_weight(packed)
    assert (back[weight == 0] == 0).all() and (back.sign() * weight.sign() >= 0).all()
    ends = {"int8": (-128, 127), "int4": (0, 15)}[format]
    assert (packed.zeros[:4] == ends[0]).all() and (packed.zeros[4:] == ends[1]).all()


def test_fp8() -> None:
    weight = weight_of(24, 100)
    weight[3] = 0
    weight[4, 0] = 1e-30
    packed = ops.pack_weight(weight, "fp8")
    assert packed.nbytes == bytes_of(24, 100, Packing("fp8"), "")
    assert packed.scales is not None and packed.scales.shape == (24, 1) and packed.values.dtype == torch.float8_e4m3fn
    # Three bits behind the leading one, and 2⁻⁹ of a step where numbers have run out of exponents.
    off = torch.maximum(weight.abs() * 2.0**-4, packed.scales * 2.0**-10) * (1 + 1e-5)
    assert ((ops.unpack_weight(packed) - weight).abs() <= off).all()
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    expected = x @ ops.unpack_weight(packed).T
    assert (ops.packed_linear(x, ops.prepare_weight(packed)) - expected).abs().max() < 1e-4
    with pytest.raises(ValueError, match="not finite"):
        ops.pack_weight(weight * torch.inf, "fp8")


@pytest.mark.parametrize("format", ["bf16", "int8", "int4", "fp8"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_shares_of_the_rows(format: Format, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large weight is rounded a few rows at a time, to the same bits."""
    whole = ops.pack_weight(weight_of(23, 64), format, symmetric=symmetric)
    monkeypatch.setattr(packed_linear, "_VALUES_AT_ONCE", 5 * 64)
    shares = ops.pack_weight(weight_of(23, 64), format, symmetric=symmetric)
    assert shares.shape == whole.shape and shares.tensors().keys() == whole.tensors().keys()
    assert all(same_bits(tensor, whole.tensors()[name]) for name, tensor in shares.tensors().items())
