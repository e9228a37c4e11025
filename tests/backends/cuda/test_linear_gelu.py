"""linear_gelu with its epilogue in CUDA C++ against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llama_multimodal import ops
from llama_multimodal.errors import DeviceError
from llama_multimodal.ops.backends.cuda import linear_gelu

from .. import references
from ..references import FLOATS, close, name_of, randn
from .conftest import Guards

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
each_kind = pytest.mark.parametrize("approximate", ["none", "tanh"])


@each_dtype
@each_kind
@pytest.mark.parametrize("shape", [(1, 5, 1), (7, 9, 33), (40, 16, 64), (3, 8, 2100)], ids=str)
def test_linear_gelu(dtype: torch.dtype, approximate: str, shape: tuple[int, ...], order: None, guards: Guards) -> None:
    rows, inputs, outputs = shape
    x, weight = guards.input(randn(1, rows, inputs, dtype=dtype)), guards.input(randn(outputs, inputs, dtype=dtype) / 4)
    bias = guards.input(randn(outputs, dtype=dtype, seed=1))
    for added in (bias, None):
        wide = x.double() @ weight.double().T + (0 if added is None else added.double())
        close(ops.linear_gelu(x, weight, added, approximate), references.gelu(wide, approximate), dtype)


@pytest.mark.usefixtures("cuda")
@each_kind
def test_a_bias_that_is_not_aligned_and_more_rows_than_a_column_of_blocks(approximate: str, guards: Guards) -> None:
    bias = guards.input(randn(8, dtype=torch.bfloat16), offset=1)
    x, weight = randn(70, 4, dtype=torch.bfloat16), randn(8, 4, dtype=torch.bfloat16)
    wide = x.double() @ weight.double().T + bias.double()
    close(ops.linear_gelu(x, weight, bias, approximate), references.gelu(wide, approximate), torch.bfloat16)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("rows, columns", [(1, 1), (5, 33), (9, 64), (1, 4104)])
def test_the_epilogue_stays_in_its_buffer(rows: int, columns: int, guards: Guards) -> None:
    product, bias = guards.empty((rows, columns), torch.float16), guards.input(randn(columns, dtype=torch.float16))
    product.copy_(randn(rows, columns, dtype=torch.float16, seed=1))
    expected = references.gelu(product + bias, "none")
    linear_gelu._launch(product.device, product.data_ptr(), bias.data_ptr(), rows, columns, 0, 1)
    close(product, expected, torch.float16)


@pytest.mark.usefixtures("cuda")
@each_kind
def test_far_values(approximate: str) -> None:
    x = torch.tensor([[-200.0], [-9], [-5], [-1.5], [0], [1.5], [9], [200]])
    ours = ops.linear_gelu(x, torch.ones(1, 1), None, approximate)
    close(ours, references.gelu(x, approximate), torch.float32, 0.1)


@pytest.mark.usefixtures("cuda")
def test_training_takes_the_reference() -> None:
    x, weight, bias = (randn(*shape).requires_grad_() for shape in ((3, 4), (5, 4), (5,)))
    ours = torch.autograd.grad(ops.linear_gelu(x, weight, bias).sum(), (x, weight, bias))
    expected = torch.autograd.grad(F.gelu(F.linear(x, weight, bias)).sum(), (x, weight, bias))
    torch.testing.assert_close(ours, expected)


@pytest.mark.usefixtures("cuda")
def test_what_is_refused() -> None:
    x, weight, bias = randn(2, 4), randn(3, 4), randn(3)
    for arguments, message in (
        ((x, weight, bias, "erf"), 'approximate is \'erf\'; takes "none" and "tanh"'),
        ((x, randn(3, 5), bias), r"x has shape \[2, 4\], weight \[3, 5\]; takes \[..., K\] and \[N, K\]"),
        ((x, weight, randn(4)), r"bias has shape \[4\]; takes \[N\], here \[3\]"),
        ((x, weight.half(), bias), "weight is torch.float16, x torch.float32; takes one dtype"),
    ):
        with pytest.raises(DeviceError, match=f'linear_gelu on backend "cuda": {message}'):
            ops.linear_gelu(*arguments)
