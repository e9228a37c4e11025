"""Products with int8 and int4 weights against fp64 products with what the packed weight stands for."""

from __future__ import annotations

import pytest
import torch

from backends.references import FLOATS, close, name_of, randn
from llama_multimodal import ops
from llama_multimodal.errors import DeviceError

SHAPES = [(5, 64, 32), (33, 96, 48), (70, 256, 128), (3, 24, 8), (1, 1024, 1024)]
"""outputs, inputs, values of a group"""


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_linear(dtype: torch.dtype, format: str, symmetric: bool, shape: tuple[int, ...], device: str) -> None:
    outputs, inputs, group = shape
    weight = randn(outputs, inputs, device=device) + 0.3
    packed = ops.prepare_weight(ops.pack_weight(weight, format, group=group, symmetric=symmetric))
    bias = randn(outputs, dtype=dtype, seed=1, device=device)
    values = ops.unpack_weight(packed).double()
    for rows in [(), (1,), (2,), (5,), (2, 4)]:
        x = randn(*rows, inputs, dtype=dtype, device=device)
        expected, scale = x.double() @ values.T, inputs**0.5
        for shift in (None, bias) if rows == (1,) else (bias,):
            ours = ops.packed_linear(x, packed, shift)
            wanted = expected if shift is None else expected + bias.double()
            close(ours / scale, wanted / scale, dtype)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 3])
def test_more_groups_than_a_step_takes(format: str, rows: int, device: str) -> None:
    packed = ops.pack_weight(randn(3, 4128, device=device), format)
    x = randn(rows, 4128, device=device)
    expected = x.double() @ ops.unpack_weight(packed).double().T
    close(ops.packed_linear(x, packed) / 64, expected / 64, torch.float32)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_every_value_meets_its_own_factor(format: str, device: str) -> None:
    """One column of x at a time gives that column of the weight."""
    weight = randn(6, 64, device=device)
    packed = ops.pack_weight(weight, format, group=16, symmetric=False)
    values, eye = ops.unpack_weight(packed), torch.eye(64, device=device)
    for first in range(0, 64, 8):
        got = ops.packed_linear(eye[first : first + 8], packed)
        torch.testing.assert_close(got, values[:, first : first + 8].t(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ops.packed_linear(eye[first], packed), values[:, first], rtol=1e-5, atol=1e-6)


def test_what_it_does_not_take(device: str) -> None:
    packed = ops.pack_weight(randn(4, 64, device=device), "int4")
    for x, weight, message in [
        (randn(1, 32, device=device), packed, r"x has shape \(1, 32\); takes \[..., K\] for a weight of \(4, 64\)"),
        (randn(1, 64, device=device), ops.pack_weight(randn(4, 64, device=device), "bf16"), 'format "bf16"'),
        (
            randn(1, 64, device=device),
            ops.pack_weight(randn(4, 64, device=device), "int4", group=4),
            "groups of 4; takes multiples of 8",
        ),
    ]:
        with pytest.raises(DeviceError, match=message):
            ops.packed_linear(x, weight)
    with pytest.raises(DeviceError, match="takes activations as they are, not rounded to 8 bits"):
        ops.packed_linear(randn(1, 64, device=device), packed, int8_activations=True)
