"""Linear layers with bf16 weights in fp32 products, on every instruction set, against fp64.

Shapes: T rows · K inputs · N outputs
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.ops.backends.cpu import library
from llama_multimodal.ops.backends.cpu import linear as module

from ..references import close, randn
from .conftest import Guards

BF16 = torch.bfloat16


@pytest.fixture
def kernel(instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not library.has_wide_linear():
        pytest.skip("this instruction set has no such kernel")
    monkeypatch.setattr(module, "cpu_gains_by", lambda dtype: False)
    monkeypatch.setattr(module, "few_rows", lambda format: 5)


# Rows in sixes, over 768 (or 1.5 million values) in another order, over 6144 not all at once; inputs in pairs of 8
# or 16, 192 at once, of many rows 1344 at most; outputs in 16s or 64s. Up to five rows go to the kernel for few.
SHAPES = [(1, 1, 1), (5, 100, 70), (9, 1, 1), (12, 31, 15), (17, 64, 64), (25, 513, 16), (97, 385, 65), (30, 2100, 200)]
SHAPES += [
    (1021, 40, 70),
    (801, 600, 1100),
    (6200, 1400, 70),
    (775, 2700, 130),
    (400, 4100, 70),
    (5, 1100, 35),
    (5, 1024, 16),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, BF16, torch.float32], ids=str)
def test_equals_fp64(
    shape: tuple[int, ...], bias_dtype: torch.dtype | None, kernel: None, guards: Guards, threads: None
) -> None:
    rows, inputs, outputs = shape
    x, weight = guards.input(randn(rows, inputs, dtype=BF16)), guards.input(randn(outputs, inputs, dtype=BF16, seed=1))
    bias = None if bias_dtype is None else guards.input(randn(outputs, dtype=bias_dtype, seed=2))
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    scale = math.sqrt(inputs)  # what is rounded is a sum of K products
    close(ops.linear(x, weight, bias) / scale, expected / scale, BF16)


# On a matrix unit 32 rows and outputs go at a time, half of them less; x stays in the cache 1 MB at a time.
UNIT_SHAPES = [(5, 32, 1), (16, 64, 16), (17, 96, 33), (32, 32, 64), (49, 160, 47), (100, 1056, 70), (1030, 1056, 200)]
UNIT_SHAPES += [(6200, 32, 40), (70, 16416, 40), (40, 16416, 70), (300, 2080, 310), (1100, 96, 1200)]


@pytest.mark.parametrize("shape", UNIT_SHAPES, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, BF16, torch.float32], ids=str)
def test_on_a_matrix_unit(
    shape: tuple[int, ...], bias_dtype: torch.dtype | None, cpu: None, guards: Guards, threads: None
) -> None:
    """It is used wherever it is there, and for as many rows as `linear` takes for it."""
    if not library.has_tile_linear(32):
        pytest.skip("this machine has none")
    test_equals_fp64(shape, bias_dtype, None, guards, threads)


def test_rows_of_several_axes_and_gaps(kernel: None) -> None:
    x, weight = randn(3, 7, 80, dtype=BF16)[..., ::2], randn(30, 80, dtype=BF16, seed=1)[:, ::2]
    ours = ops.linear(x, weight)
    assert ours.shape == (3, 7, 30)
    close(ours / 6, x.double() @ weight.double().T / 6, BF16)


def test_nan_stays_in_its_row(kernel: None) -> None:
    x, weight = randn(20, 70, dtype=BF16), randn(40, 70, dtype=BF16, seed=1)
    x[7, 69] = math.nan
    assert torch.equal(ops.linear(x, weight).isnan().all(1), torch.arange(20) == 7)


def test_opcheck(kernel: None) -> None:
    arguments = (randn(20, 32, dtype=BF16), randn(5, 32, dtype=BF16), randn(5, dtype=BF16))
    torch.library.opcheck(torch.ops.llama_mm.cpu_linear.default, arguments)


def test_what_is_left_to_torch(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other dtypes, no rows, and CPUs that gain by bf16, unless by a matrix unit; not few rows."""
    taken: list[Tensor] = []
    monkeypatch.setattr(module, "cpu_linear", lambda x, *_: taken.append(x) or x)
    x, weight = randn(20, 32, dtype=BF16), randn(5, 32, dtype=BF16)
    ops.linear(x, weight)
    ops.linear(x[:4], weight)
    assert len(taken) == 2
    ops.linear(x.float(), weight.float())
    ops.linear(x[:0], weight)
    monkeypatch.setattr(module, "cpu_gains_by", lambda dtype: True)
    ops.linear(x, weight)
    assert len(taken) == 2 + library.has_tile_linear(32)


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [((20, 31), 5, "x has shape (20, 31), and the weight takes [..., 32]"), ((20, 32), 4, "the weight takes [5]")],
)
def test_shapes_that_do_not_go_together(x: tuple[int, int], bias: int, message: str, kernel: None) -> None:
    with pytest.raises(ValueError) as raised:
        ops.linear(torch.zeros(x, dtype=BF16), torch.zeros(5, 32, dtype=BF16), torch.zeros(bias, dtype=BF16))
    assert message in str(raised.value)
