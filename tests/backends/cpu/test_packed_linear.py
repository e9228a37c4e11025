"""packed_linear on CPUs against fp64, on every instruction set.

Shapes: N outputs · K inputs · G values of a group · T rows of x
"""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.errors import DeviceError
from llama_multimodal.ops import PackedWeight
from llama_multimodal.ops.backends.cpu import library, packed_linear

from ..references import FLOATS, name_of, randn
from .conftest import Guards

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
each_format = pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
each_integer = pytest.mark.parametrize("format", ["int8", "int4"])

# What the sums may be off by, relative to |x| |w|; the results are rounded to x's dtype on top. Stated in the module.
SUMS = {torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 5e-5, torch.float64: 1e-14}
HALF_A_UNIT = 0.501  # of the last place


def expected(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`packed` in the plain layout; in fp64."""
    out = x.double() @ ops.unpack_weight(packed).double().T
    return out if bias is None else out + bias.double()


def goes_to_matrix_unit(x: Tensor, least_rows: int = 8) -> bool:
    """Where an unpacked weight is rounded to bf16, and x never is to 8 bits."""
    rows = x.numel() // max(1, x.shape[-1])
    return x.dtype == torch.bfloat16 and rows >= least_rows and library.has_tile_linear(x.shape[-1])


def close(ours: Tensor, reference: Tensor, x: Tensor, sums: float | None = None) -> None:
    """Every element, relative to the row's |x|: weights are of order 1."""
    assert ours.shape == reference.shape and ours.dtype == x.dtype
    if sums is None and goes_to_matrix_unit(x):
        sums = 2**-6
    norm = x.double().norm(dim=-1, keepdim=True)
    allowed = (
        norm * (SUMS[x.dtype] if sums is None else sums) + reference.abs() * HALF_A_UNIT * torch.finfo(x.dtype).eps
    )
    error = (ours.double() - reference).abs()
    assert (error <= allowed).all(), f"{(error / allowed).max():.2f} times what is allowed"


def guarded(packed: PackedWeight, guards: Guards) -> PackedWeight:
    return packed.mapped(guards.input)


def guarded_case(
    shape: tuple[int, ...], dtype: torch.dtype, format: str, symmetric: bool, guards: Guards
) -> tuple[Tensor, Tensor, PackedWeight, PackedWeight]:
    """x, bias, and a weight of T, N, K, G in the plain layout and prepared."""
    rows, outputs, inputs, group = shape
    weight = randn(outputs, inputs) + (0 if symmetric else 0.7)
    x, bias = guards.input(randn(rows, inputs, dtype=dtype)), guards.input(randn(outputs, dtype=dtype, seed=1))
    packed = ops.pack_weight(weight, format, group=group, symmetric=symmetric)
    return x, bias, packed, guarded(ops.prepare_weight(packed), guards)


@pytest.fixture
def kernels_only(instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows, and whatever would be fastest."""
    for few in (packed_linear._FEW_BF16, packed_linear._FEW_WIDENED, packed_linear._FEW_INTEGER):
        monkeypatch.setitem(few, instruction_set, 100)


# T, N, K, G
SHAPES = [(1, 1, 32, 32), (1, 77, 160, 32), (3, 17, 96, 96), (8, 48, 256, 64), (5, 33, 64, 32), (19, 31, 128, 128)]
SHAPES += [(6, 35, 1056, 32), (7, 38, 544, 32), (23, 27, 1056, 32)]  # bf16: more inputs than are taken at a time


@each_dtype
@each_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_few_rows(
    kernels_only: None, dtype: torch.dtype, format: str, shape: tuple[int, ...], symmetric: bool, guards: Guards
) -> None:
    x, bias, packed, prepared = guarded_case(shape, dtype, format, symmetric, guards)
    assert prepared.layout == ("plain" if format == "bf16" else packed_linear.LAYOUT)
    close(ops.packed_linear(x, prepared), expected(x, packed), x)
    close(ops.packed_linear(x, prepared, bias), expected(x, packed, bias), x)


@pytest.mark.parametrize("inputs", [1, 5, 31, 33, 63, 100])
@each_dtype
def test_bf16_weights_take_any_number_of_inputs(
    instruction_set: str, dtype: torch.dtype, inputs: int, guards: Guards
) -> None:
    packed = guarded(ops.pack_weight(randn(6, inputs), "bf16"), guards)
    x = guards.input(randn(2, inputs, dtype=dtype))
    close(ops.packed_linear(x, packed), expected(x, packed), x)


@each_integer
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("rows, int8_activations", [(2, False), (20, True)], ids=["", "a8"])
def test_instruction_sets_agree(cpu: None, format: str, symmetric: bool, rows: int, int8_activations: bool) -> None:
    """They sum the same whole numbers, and differ by fp32's order of the blocks only."""
    packed = ops.prepare_weight(ops.pack_weight(randn(64, 2048) + 0.5, format, symmetric=symmetric))
    for dtype in (torch.float32, torch.bfloat16):
        x, results = randn(rows, 2048, dtype=dtype), {}
        best = library.instruction_set()
        for name in library.INSTRUCTION_SETS:
            if library.use_instruction_set(name):
                results[name] = ops.packed_linear(x, packed, None, int8_activations).float()
        library.use_instruction_set(best)
        first, *others = results.values()
        for other in others:
            allowed = 1e-6 * math.sqrt(2048) + first.abs() * torch.finfo(dtype).eps
            assert ((other - first).abs() <= allowed).all()


@each_format
@each_dtype
def test_many_rows_go_through_torch(instruction_set: str, dtype: torch.dtype, format: str, guards: Guards) -> None:
    """In blocks of outputs; bf16 products round an unpacked weight to bf16, as the reference does."""
    packed = ops.pack_weight(randn(50, 64), format)
    prepared = guarded(ops.prepare_weight(packed), guards)
    x, bias = guards.input(randn(300, 64, dtype=dtype)), randn(50, dtype=dtype, seed=1)
    sums = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-6}[dtype]
    close(ops.packed_linear(x, prepared, bias), expected(x, packed, bias), x, sums=sums)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_unpacked_tiles_are_the_weight(
    instruction_set: str, format: str, symmetric: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: the product with the identity, through torch."""
    monkeypatch.setitem(packed_linear._FEW_INTEGER, instruction_set, 0)
    packed = ops.pack_weight(randn(40, 256), format, symmetric=symmetric)
    ours = ops.packed_linear(torch.eye(256, dtype=dtype), ops.prepare_weight(packed))
    assert torch.equal(ours.T, ops.unpack_weight(packed).to(dtype))


@each_dtype
@each_format
@pytest.mark.parametrize("rows", [9, 64, 513])
@pytest.mark.parametrize("outputs, inputs, group", [(77, 160, 32), (33, 192, 96), (50, 36, 12)])
@pytest.mark.parametrize("native", [True, False], ids=["native", "widened"])
def test_many_rows_in_several_blocks(
    cpu: None,
    dtype: torch.dtype,
    format: str,
    rows: int,
    outputs: int,
    inputs: int,
    group: int,
    native: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On CPUs with half-precision arithmetic and without, the last block shorter, the last group of rows too."""
    linear = importlib.import_module("llama_multimodal.ops.linear")
    monkeypatch.setattr(linear, "_VALUES_AT_ONCE", inputs * 32)  # 32 outputs
    for module in (linear, packed_linear):
        monkeypatch.setattr(module, "cpu_gains_by", lambda dtype: native)
    weight, bias = randn(outputs, inputs) + 0.7, randn(outputs, dtype=dtype, seed=1)
    packed, x = ops.pack_weight(weight, format, group=group, symmetric=False), randn(rows, inputs, dtype=dtype)
    # A native product rounds the unpacked weight to x's dtype. Twice what other tests allow: weights lie off zero.
    rounds = native or goes_to_matrix_unit(x)
    sums = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 4e-6}[dtype if rounds else torch.float32]
    if dtype == torch.bfloat16:  # a few rows go through the kernel, which rounds x
        sums = max(sums, SUMS[dtype])
    for laid_out in (packed, ops.prepare_weight(packed)):
        close(ops.packed_linear(x, laid_out, bias), expected(x, packed, bias), x, sums=sums)
        close(ops.packed_linear(x, laid_out), expected(x, packed), x, sums=sums)


# T, N, K, G: 32 rows and outputs at a time, half of them less; a thread unpacks as many outputs as make 1 MB
UNIT_SHAPES = [(8, 16, 32, 32), (16, 17, 64, 64), (17, 33, 96, 32), (32, 64, 96, 96), (49, 47, 160, 32)]
UNIT_SHAPES += [(100, 700, 1056, 96), (9, 70, 16416, 32)]


@each_format
@pytest.mark.parametrize("shape", UNIT_SHAPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_on_a_matrix_unit(
    cpu: None, threads: None, format: str, shape: tuple[int, ...], symmetric: bool, guards: Guards
) -> None:
    """In fp64 of the weights as they are rounded to bf16, nothing else is lost."""
    if not library.has_tile_linear(32):
        pytest.skip("this machine has none")
    x, bias, packed, prepared = guarded_case(shape, torch.bfloat16, format, symmetric, guards)
    rounded = ops.pack_weight(ops.unpack_weight(packed).bfloat16(), "bf16")
    for added in (bias, None):
        ours = ops.packed_linear(x, prepared, added)
        close(ours, expected(x, rounded, added), x, sums=SUMS[torch.bfloat16])


@each_format
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name_of)
def test_the_plain_layout_and_small_groups_work_too(cpu: None, dtype: torch.dtype, rows: int, format: str) -> None:
    packed = ops.pack_weight(randn(9, 36), format, group=4)
    prepared = ops.prepare_weight(packed)
    assert prepared.layout == "plain"
    x = randn(rows, 36, dtype=dtype)
    close(ops.packed_linear(x, prepared), expected(x, packed), x, sums=2**-7 if dtype == torch.bfloat16 else None)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("outputs, inputs", [(0, 64), (7, 0)])
def test_a_weight_of_nothing(instruction_set: str, rows: int, outputs: int, inputs: int) -> None:
    packed, x = ops.pack_weight(torch.zeros(outputs, inputs), "bf16"), randn(rows, inputs, dtype=torch.bfloat16)
    bias = randn(outputs, dtype=torch.bfloat16)
    assert torch.equal(ops.packed_linear(x, packed, bias), bias.expand(rows, outputs))


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_any_shape_and_strides_of_x(cpu: None, dtype: torch.dtype, format: str) -> None:
    packed = ops.pack_weight(randn(21, 64), format)
    prepared = ops.prepare_weight(packed)
    wide = randn(3, 2, 128, dtype=dtype)
    views = [wide[..., ::2], wide[:, 1, :64], wide.transpose(0, 1)[..., 64:], wide[0, 0, 3:67], wide[:1, :, :64]]
    views += [randn(64, 5, dtype=dtype).T, randn(1, 64, dtype=dtype).expand(4, 64)]
    for x in views:
        ours = ops.packed_linear(x, prepared)
        assert ours.shape == (*x.shape[:-1], 21) and ours.is_contiguous()
        close(ours, expected(x, packed), x)
    assert ops.packed_linear(randn(0, 64, dtype=dtype), prepared).shape == (0, 21)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=name_of)
def test_a_bias_of_any_dtype(cpu: None, dtype: torch.dtype) -> None:
    packed, x = ops.pack_weight(randn(5, 32), "int4"), randn(1, 32)
    bias = randn(10, dtype=dtype)[::2]
    close(ops.packed_linear(x, ops.prepare_weight(packed), bias), expected(x, packed, bias), x)


@each_integer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("int8_activations", [False, True], ids=["", "a8"])
def test_x_of_any_size(kernels_only: None, format: str, dtype: torch.dtype, int8_activations: bool) -> None:
    """Blocks of zeros, of outliers, and of very small and large values; each row keeps its own steps."""
    packed = ops.pack_weight(randn(20, 128), format)
    x = randn(6, 128, dtype=dtype)
    x[0] = 0
    x[1, :64] = 0
    x[2, 5] = 3000
    x[3] *= 1e-20
    x[4] *= 1e20
    x[5, ::7] *= 1000
    prepared = ops.prepare_weight(packed)
    ours = ops.packed_linear(x, prepared, None, int8_activations)
    close(ours, expected(ops.round_activations(x) if int8_activations else x, packed), x)
    assert (ours[0] == 0).all()
    tiny = ops.packed_linear(x * 0 + 1e-35, prepared, None, int8_activations)
    assert (tiny == 0).all() or (goes_to_matrix_unit(x) and not int8_activations)  # as the module says


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(kernels_only: None, format: str, bad: float) -> None:
    packed = ops.prepare_weight(ops.pack_weight(randn(20, 64), format))
    x = randn(2, 64)
    x[1, 40] = bad
    ours = ops.packed_linear(x, packed)
    assert ours[1].isnan().all() and ours[0].isfinite().all()


@each_format
def test_threads_change_nothing(cpu: None, threads: None, format: str) -> None:
    packed = ops.prepare_weight(ops.pack_weight(randn(1024, 256), format))
    x = randn(2, 256, dtype=torch.bfloat16)
    split = ops.packed_linear(x, packed)
    torch.set_num_threads(1)
    assert torch.equal(ops.packed_linear(x, packed), split)


def test_prepared_weights_take_no_more_room(cpu: None) -> None:
    for symmetric in (True, False):
        packed = ops.pack_weight(randn(64, 128), "int4", symmetric=symmetric)
        prepared = ops.prepare_weight(packed)
        assert prepared.nbytes == packed.nbytes and (prepared.zeros is None) == symmetric
        assert ops.prepare_weight(prepared) is prepared


# --- 8-bit activations -----------------------------------------------------------------------------------------------

# T, N, K, G: rows go over a tile in panels of 16 and of 8, and what is left of them
SHAPES_8_BITS = [
    (1, 77, 160, 32), (5, 33, 64, 64), (8, 17, 256, 128), (16, 48, 96, 32), (19, 31, 128, 64), (40, 45, 128, 128),
]  # fmt: skip


def close_to_rounded(ours: Tensor, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> None:
    """To the rounding of fp32 sums, for every dtype of x: the whole numbers are exact."""
    if goes_to_matrix_unit(x, least_rows=24):
        return close(ours, expected(x, packed, bias), x)
    close(ours, expected(ops.round_activations(x), packed, bias), x, sums=SUMS[torch.float32])


@each_dtype
@each_integer
@pytest.mark.parametrize("shape", SHAPES_8_BITS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_8_bit_activations(
    instruction_set: str, dtype: torch.dtype, format: str, shape: tuple[int, ...], symmetric: bool, guards: Guards
) -> None:
    x, bias, packed, prepared = guarded_case(shape, dtype, format, symmetric, guards)
    close_to_rounded(ops.packed_linear(x, prepared, int8_activations=True), x, packed)
    close_to_rounded(ops.packed_linear(x, prepared, bias, int8_activations=True), x, packed, bias)


@each_integer
def test_8_bit_activations_of_any_number_of_rows(instruction_set: str, format: str, guards: Guards) -> None:
    packed = ops.pack_weight(randn(21, 64) + 0.7, format, symmetric=False)
    prepared = guarded(ops.prepare_weight(packed), guards)
    for rows in range(1, 34):
        x = guards.input(randn(rows, 64, dtype=torch.bfloat16))
        close_to_rounded(ops.packed_linear(x, prepared, int8_activations=True), x, packed)
    assert ops.packed_linear(randn(0, 64), prepared, int8_activations=True).shape == (0, 21)


@each_integer
@pytest.mark.parametrize("zero", ["middle", "low", "high"])
def test_8_bit_values_at_the_ends_of_their_range(instruction_set: str, format: str, zero: str) -> None:
    """Powers of two as steps leave nothing to round, so that any sum that overflows or saturates shows."""
    low, high, dtype = (-128, 127, torch.int8) if format == "int8" else (0, 15, torch.uint8)
    places = torch.arange(128)
    patterns = torch.stack([places * 0, places * 0 + 1, *(places // run % 2 for run in (1, 2, 4, 16, 32))])
    stored = torch.where(torch.cat((patterns, randn(12, 128) > 0)) > 0, high, low).to(dtype)
    values = stored if format == "int8" else stored[:, ::2] | stored[:, 1::2] << 4
    zeros = None if zero == "middle" else torch.full((19, 2), low if zero == "low" else high, dtype=dtype)
    packed = PackedWeight(format, (19, 128), values, torch.full((19, 2), 0.25).half(), zeros, 64)  # type: ignore[arg-type]
    signs = torch.cat((patterns, 1 - patterns, (randn(9, 128) > 0).int())) * 2 - 1
    x = signs * (127 / 128)  # a step of 1/128 and nothing but -127 and 127
    ours = ops.packed_linear(x, ops.prepare_weight(packed), int8_activations=True)
    assert torch.equal(ours.double(), expected(x, packed))


def test_8_bit_activations_of_very_many_rows(cpu: None) -> None:
    """In several pieces, so that a long prompt's rounded rows take little memory."""
    packed, x = ops.pack_weight(randn(7, 32), "int8"), randn(2, 1100, 32)
    close_to_rounded(ops.packed_linear(x, ops.prepare_weight(packed), int8_activations=True), x, packed)


@each_integer
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_leave_the_others_alone(instruction_set: str, format: str, bad: float) -> None:
    packed = ops.prepare_weight(ops.pack_weight(randn(20, 96), format, symmetric=False))
    x = randn(19, 96)
    clean = ops.packed_linear(x, packed, int8_activations=True)
    x[3, 40] = x[17, 0] = bad
    ours = ops.packed_linear(x, packed, int8_activations=True)
    assert ours[[3, 17]].isnan().all() and clean.isfinite().all()
    others = [row for row in range(19) if row not in (3, 17)]
    assert torch.equal(ours[others], clean[others])


@each_integer
def test_8_bit_activations_of_any_shape_and_strides(cpu: None, format: str) -> None:
    packed = ops.pack_weight(randn(21, 64), format)
    wide = randn(3, 2, 128)
    for x in (wide[..., ::2], wide[0, 0, 3:67], randn(64, 5).T, randn(1, 64).expand(4, 64)):
        ours = ops.packed_linear(x, ops.prepare_weight(packed), int8_activations=True)
        close_to_rounded(ours, x, packed)
        assert ours.is_contiguous()


@each_integer
def test_threads_change_nothing_of_many_rows(cpu: None, threads: None, format: str) -> None:
    packed = ops.prepare_weight(ops.pack_weight(randn(1024, 256), format))
    x = randn(43, 256, dtype=torch.bfloat16)
    split = ops.packed_linear(x, packed, int8_activations=True)
    torch.set_num_threads(1)
    assert torch.equal(ops.packed_linear(x, packed, int8_activations=True), split)


@pytest.mark.parametrize("dtype, layout", [(torch.float32, "plain"), (torch.float64, packed_linear.LAYOUT)])
def test_8_bit_activations_that_go_through_the_reference(attached: None, dtype: torch.dtype, layout: str) -> None:
    """What the kernels do not take, by itself; forced, they say so."""
    packed = ops.pack_weight(randn(9, 64), "int8")
    given = packed if layout == "plain" else ops.prepare_weight(packed)
    assert given.layout == layout
    x = randn(3, 64, dtype=dtype)
    with ops.use_backend("torch"):
        reference = ops.packed_linear(x, given, int8_activations=True)
    close(reference, expected(ops.round_activations(x), packed), x, sums=SUMS[torch.float32])
    assert torch.equal(ops.packed_linear(x, given, int8_activations=True), reference)
    why = "with 8-bit activations takes a prepared weight and x in 32 bits or fewer"
    with ops.use_backend("cpu"), pytest.raises(DeviceError, match=f'packed_linear on backend "cpu": {why}'):
        ops.packed_linear(x, given, int8_activations=True)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, bias, message",
    [
        (torch.zeros(2, 33), None, r"x has shape \(2, 33\), and the weight takes \[\.\.\., 32\]"),
        (torch.zeros(()), None, r"x has shape \(\)"),
        (torch.zeros(2, 32), torch.zeros(3), r"bias has shape \(3,\), and the weight takes \[4\]"),
    ],
)
def test_what_does_not_fit_is_named(cpu: None, x: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.packed_linear(x, ops.prepare_weight(ops.pack_weight(randn(4, 32), "int8")), bias)


def test_what_is_refused_says_why(cpu: None) -> None:
    packed = ops.prepare_weight(ops.pack_weight(randn(4, 32), "int8"))
    with pytest.raises(DeviceError, match=r"floating-point dtype, not torch\.int64"):
        ops.packed_linear(torch.zeros(1, 32, dtype=torch.int64), packed)
    with pytest.raises(DeviceError, match='layout "somebody else\'s"'):
        ops.packed_linear(randn(1, 32), replace(packed, layout="somebody else's"))
    with pytest.raises(DeviceError, match="takes CPU tensors; x is on meta"):
        ops.packed_linear(randn(1, 32).to("meta"), packed)
    with pytest.raises(DeviceError, match="no backward, and a gradient is wanted"):
        ops.packed_linear(randn(1, 32).requires_grad_(), packed)


# --- torch.library ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "format, int8_activations",
    [("bf16", False), ("int8", False), ("int4", False), ("int8", True), ("int4", True)],
    ids=["bf16", "int8", "int4", "int8 a8", "int4 a8"],
)
@pytest.mark.parametrize("rows", [2, 200])
def test_opcheck(cpu: None, format: str, int8_activations: bool, rows: int) -> None:
    packed = ops.prepare_weight(ops.pack_weight(randn(20, 64), format, symmetric=False))
    x, bias = randn(rows, 64, dtype=torch.bfloat16), randn(20)
    weight = (packed.values, packed.scales, packed.zeros)
    facts = (packed.format, packed.layout, 20, packed.group, int8_activations)
    torch.library.opcheck(torch.ops.llama_mm.cpu_packed_linear.default, (x, *weight, bias, *facts))


@pytest.mark.parametrize("int8_activations", [False, True], ids=["", "a8"])
def test_compiles_in_one_graph(cpu: None, int8_activations: bool) -> None:
    packed = ops.prepare_weight(ops.pack_weight(randn(20, 64), "int4"))
    x = randn(2, 64)

    def one_more(x: Tensor) -> Tensor:
        return packed_linear.packed_linear(x, packed, None, int8_activations) + 1

    compiled = torch.compile(one_more, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.packed_linear(x, packed, None, int8_activations) + 1)
