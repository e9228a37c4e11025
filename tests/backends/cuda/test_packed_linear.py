"""packed_linear in CUDA C++ against fp64 products with what the packed weight stands for.

Shapes: T rows of x · N outputs · K inputs · G values of a group
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.errors import DeviceError
from llama_multimodal.ops import PackedWeight
from llama_multimodal.ops.backends.cuda import library, packed_linear

from ..references import FLOATS, close, name_of, poisoned, randn
from .conftest import Guards

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
each_format = pytest.mark.parametrize("format", ["int8", "int4"])
each_zero = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])

SHAPES = [
    (9, 64, 32),
    (8, 192, 96),
    (101, 256, 128),  # blocks with several lines of threads
    (19, 1056, 32),
    (13, 48, 16),  # whole vectors of int8 only
    (10, 72, 24),  # no whole vectors
    (11, 40, 8),
    (3, 96, 32),  # fewer outputs than a thread takes
]
"""N, K, G"""


def expected(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """In fp64."""
    out = x.double() @ ops.unpack_weight(packed).double().T
    return out if bias is None else out + bias.double()


def check(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> None:
    """Relative to |x|: the weights are of order 1."""
    scale = x.shape[-1] ** 0.5
    ours = ops.packed_linear(x, packed, bias)
    close((ours.float() / scale).to(x.dtype), expected(x, packed, bias) / scale, x.dtype)


def guarded(packed: PackedWeight, guards: Guards) -> PackedWeight:
    tensors = {name: getattr(packed, name) for name in ("values", "scales", "zeros")}
    return replace(packed, **{name: guards.input(t) for name, t in tensors.items() if t is not None})


def packed_of(shape: tuple[int, int, int], format: str, symmetric: bool = True) -> PackedWeight:
    outputs, inputs, group = shape
    weight = randn(outputs, inputs) + (0 if symmetric else 0.7)
    return ops.pack_weight(weight, format, group=group, symmetric=symmetric)  # type: ignore[arg-type]


@each_dtype
@each_format
@each_zero
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_linear(
    dtype: torch.dtype, format: str, symmetric: bool, shape: tuple[int, int, int], cuda: None, guards: Guards
) -> None:
    packed = guarded(packed_of(shape, format, symmetric), guards)
    bias = guards.input(randn(shape[0], dtype=dtype, seed=1))
    for rows in [(), (2,), (1, 3), (7,), (2, 4)]:
        x = guards.input(randn(*rows, shape[1], dtype=dtype))
        check(x, packed)
        check(x, packed, bias)


@each_format
@pytest.mark.parametrize("rows, inputs", [(1, 9248), (2, 4128), (4, 2112), (8, 2112)])
def test_several_steps_along_a_row(rows: int, inputs: int, format: str, order: None, guards: Guards) -> None:
    """The last one ends within a warp, and the tile of x is filled again for each."""
    packed = guarded(packed_of((17, inputs, 32), format, symmetric=False), guards)
    check(guards.input(randn(rows, inputs, dtype=torch.bfloat16)), packed)


@pytest.mark.usefixtures("cuda")
@each_format
@pytest.mark.parametrize("rows", range(1, 9))
def test_any_number_of_rows(rows: int, format: str, guards: Guards) -> None:
    packed = guarded(packed_of((60, 160, 32), format), guards)
    check(guards.input(randn(rows, 160, dtype=torch.float16)), packed, guards.input(randn(60, dtype=torch.float16)))


@pytest.mark.usefixtures("cuda")
@each_format
@each_zero
@pytest.mark.parametrize("group", [16, 32])
def test_every_value_meets_its_own_factor(format: str, symmetric: bool, group: int) -> None:
    """A column of x at a time gives that column of the weight: all of its bits, without and with sums of x."""
    packed = packed_of((9, 96, group), format, symmetric)
    values, eye = ops.unpack_weight(packed), torch.eye(96)
    for first in range(0, 96, 8):
        assert torch.equal(ops.packed_linear(eye[first : first + 8], packed), values[:, first : first + 8].t())
    for column in range(96):
        assert torch.equal(ops.packed_linear(eye[column], packed), values[:, column])
        assert torch.equal(ops.packed_linear(eye[column].half(), packed), values[:, column].half())


@pytest.mark.usefixtures("cuda")
@each_format
def test_weights_at_the_ends_of_their_range(format: str) -> None:
    """Every stored value with every kind of zero; powers of two as scales leave no rounding."""
    low, high, dtype = (-128, 127, torch.int8) if format == "int8" else (0, 15, torch.uint8)
    stored = torch.arange(low, high + 1).repeat(2560 // (high + 1 - low)).view(8, 320)
    values = stored.to(dtype) if format == "int8" else (stored[:, ::2] | stored[:, 1::2] << 4).to(dtype)
    zeros = torch.tensor([low, high] * 40, dtype=dtype).view(8, 10)
    packed = PackedWeight(format, (8, 320), values, torch.full((8, 10), 0.25).half(), zeros, 32)  # type: ignore[arg-type]
    for rows in (1, 2):
        x = randn(rows, 320, dtype=torch.bfloat16)
        close(ops.packed_linear(x, packed) / 256, expected(x, packed) / 256, torch.bfloat16)


@each_dtype
@each_format
@pytest.mark.parametrize("group", [32, 8])
def test_x_of_any_strides(dtype: torch.dtype, format: str, group: int, cuda: None, guards: Guards) -> None:
    packed = packed_of((21, 64, group), format)
    wide = guards.input(randn(3, 2, 128, dtype=dtype))
    views = [wide[..., ::2], wide[:, 1, :64], wide.transpose(0, 1)[..., 64:], wide[0, 0, 3:67], wide[:1, :, :64]]
    views += [guards.input(poisoned(randn(4, 64, dtype=dtype))), guards.input(randn(64, 5, dtype=dtype)).T]
    views += [guards.input(randn(2, 64, dtype=dtype), offset=1), guards.input(randn(1, 64, dtype=dtype)).expand(4, 64)]
    for x in views:
        check(x, packed)


@pytest.mark.usefixtures("cuda")
@each_format
def test_weights_of_any_strides(format: str, guards: Guards) -> None:
    """Every other row, and values that do not begin at a multiple of 16 bytes."""
    packed, x = packed_of((18, 64, 32), format, symmetric=False), randn(3, 64)
    every_other = {name: getattr(packed, name)[::2] for name in ("values", "scales", "zeros")}
    check(x, replace(packed, shape=(9, 64), **every_other), randn(18)[::2])
    check(x, replace(packed, values=guards.input(packed.values, offset=1)))


@pytest.mark.usefixtures("cuda")
@each_format
def test_nothing_to_do(format: str) -> None:
    packed = packed_of((9, 64, 32), format)
    assert ops.packed_linear(randn(0, 64), packed).shape == (0, 9)
    none = replace(packed, shape=(0, 64), values=packed.values[:0], scales=packed.scales[:0])  # type: ignore[index]
    assert ops.packed_linear(randn(2, 64), none).shape == (2, 0)


@pytest.mark.usefixtures("cuda")
@each_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_not_finite_shows(rows: int, bad: float, format: str) -> None:
    packed, x = packed_of((9, 64, 32), format), randn(rows, 64, dtype=torch.bfloat16)
    x[0, 40] = bad
    ours = ops.packed_linear(x, packed)
    assert not ours[0].isfinite().any() and ours[1:].isfinite().all()


@pytest.mark.usefixtures("cuda")
def test_rows_of_x_past_32_bits() -> None:
    """Two rows 2³¹ elements apart, in memory of which only they are ever touched."""
    far = torch.empty(2**31 + 2 * 32, dtype=torch.float16).as_strided((2, 64), (2**31, 1))
    far.copy_(randn(2, 64))
    for group in (32, 8):
        packed = packed_of((9, 64, group), "int4")
        assert torch.equal(ops.packed_linear(far, packed), ops.packed_linear(far.clone(), packed))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cuda")
def test_what_is_refused() -> None:
    packed, x = packed_of((9, 64, 32), "int4"), randn(2, 64)
    for arguments, message in (
        ((randn(2, 32), packed), r"x has shape \[2, 32\]; takes \[..., K\], here \[..., 64\]"),
        ((torch.tensor(1.0), packed), r"x has shape \[\]"),
        ((x, ops.pack_weight(randn(9, 64), "bf16")), 'packed has format "bf16" in layout "plain"; takes int8 and int4'),
        ((x, replace(packed, layout="cpu tiles")), 'packed has format "int4" in layout "cpu tiles"'),
        ((x, packed, randn(8)), r"bias has shape \[8\]; takes \[N\], here \[9\]"),
        ((x, packed, randn(9).half()), "bias is torch.float16, x torch.float32; takes one dtype"),
        ((x.double(), packed), "x is torch.float64; takes float32, float16 and bfloat16"),
        ((x, packed, None, True), "takes activations as they are, not rounded to 8 bits"),
        ((x.to("meta"), packed), "packed is on cpu, x on meta; takes one device"),
        ((randn(2, 64).requires_grad_(), packed), "no backward, and a gradient is wanted"),
    ):
        with pytest.raises(DeviceError, match=f'packed_linear on backend "cuda": .*{message}'):
            ops.packed_linear(*arguments)


@pytest.mark.usefixtures("cuda")
def test_the_library_takes_no_more_rows_either() -> None:
    with pytest.raises(DeviceError, match="packed_linear: CUDA error 1"):
        packed_linear.cuda_packed_linear(randn(9, 64), *fields(packed_of((9, 64, 32), "int4")))


def test_weights_stay_plain(cuda: None) -> None:
    """So that a prompt's rows, which go through the reference, find the layout that it reads."""
    packed = packed_of((9, 64, 32), "int4")
    assert ops.prepare_weight(packed).layout == "plain"
    assert library._attached().device_type == "cpu"  # it was the kernels' backend that was asked


# --- torch.library ---------------------------------------------------------------------------------------------------


def fields(packed: PackedWeight, bias: Tensor | None = None) -> tuple[Any, ...]:
    return packed.values, packed.scales, packed.zeros, bias, packed.group


@pytest.mark.usefixtures("cuda")
@each_format
@each_zero
@pytest.mark.parametrize("rows", [(), (2, 3)], ids=str)
def test_opcheck(format: str, symmetric: bool, rows: tuple[int, ...]) -> None:
    weight = packed_of((9, 64, 32), format, symmetric)
    for bias in (None, randn(9, dtype=torch.bfloat16)):
        arguments = (randn(*rows, 64, dtype=torch.bfloat16), *fields(weight, bias))
        torch.library.opcheck(torch.ops.llama_mm.cuda_packed_linear.default, arguments)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("rows", [(64,), (2, 3, 64)], ids=str)
def test_compiles_in_one_graph(rows: tuple[int, ...]) -> None:
    packed, x, bias = packed_of((9, 64, 32), "int4"), randn(*rows), randn(9)
    compiled = torch.compile(lambda x: ops.packed_linear(x, packed, bias) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.packed_linear(x, packed, bias) + 1)
