"""swiglu in CUDA C++ against fp64, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.errors import DeviceError

from .. import references
from ..references import FLOATS, close, name_of, randn
from .conftest import Guards

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
SHAPES = [(), (1,), (3, 7), (2, 5, 33), (3, 64), (2, 4200), (1, 2, 4098)]


def gradients(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().double().requires_grad_() for t in (gate, up)]
    return torch.autograd.grad(references.swiglu(*leaves), leaves, grad.double())


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_tensors(dtype: torch.dtype, shape: tuple[int, ...], order: None, guards: Guards) -> None:
    gate = guards.input(3 * randn(*shape, dtype=dtype)).requires_grad_()
    up, grad = (guards.input(randn(*shape, dtype=dtype, seed=seed)).requires_grad_() for seed in (1, 2))
    ours = ops.swiglu(gate, up)
    close(ours, references.swiglu(gate, up).detach(), dtype)
    for got, expected in zip(torch.autograd.grad(ours, (gate, up), grad), gradients(gate, up, grad)):
        close(got, expected, dtype, 2)


@each_dtype
@pytest.mark.parametrize("shape", [(2,), (3, 14), (2, 3, 64), (2, 8200)], ids=str)
def test_one_packed_tensor(dtype: torch.dtype, shape: tuple[int, ...], order: None, guards: Guards) -> None:
    packed = guards.input(2 * randn(*shape, dtype=dtype)).requires_grad_()
    gate, up = packed.detach().chunk(2, dim=-1)
    grad = guards.input(randn(*gate.shape, dtype=dtype, seed=1))
    ours = ops.swiglu(packed)
    close(ours, references.swiglu(gate, up), dtype)
    (got,) = torch.autograd.grad(ours, packed, grad)
    close(got, torch.cat(gradients(gate, up, grad), dim=-1), dtype, 2)


@pytest.mark.usefixtures("cuda")
@each_dtype
@pytest.mark.parametrize("columns", [5, 64])
def test_any_place_in_memory(dtype: torch.dtype, columns: int, guards: Guards) -> None:
    packed = guards.input(randn(2, 3, 2 * columns, dtype=dtype))
    halves = packed.chunk(2, dim=-1)
    wide = guards.input(randn(2, 3, 3 * columns, dtype=dtype))[..., columns:]  # packed, with gaps between rows
    flipped = packed.transpose(0, 1)
    apart = guards.input(randn(2, 3, columns, 2, dtype=dtype))[..., 1]
    shifted = guards.input(randn(2, 3, columns, dtype=dtype), offset=1)
    close(ops.swiglu(*halves), references.swiglu(*halves), dtype)
    for x in (wide, flipped):
        close(ops.swiglu(x), references.swiglu(*x.chunk(2, dim=-1)), dtype)
    for x in (apart, shifted):
        close(ops.swiglu(x, halves[1]), references.swiglu(x, halves[1]), dtype)
    gate, up = (x.detach().requires_grad_() for x in halves)
    grad = randn(1, 1, 1, dtype=dtype).expand(2, 3, columns)
    for got, expected in zip(torch.autograd.grad(ops.swiglu(gate, up), (gate, up), grad), gradients(gate, up, grad)):
        close(got, expected, dtype, 2)


@pytest.mark.usefixtures("cuda")
@each_dtype
def test_far_values(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e4, -90, -30, -1, 0, 30, 90, 1e4], dtype=dtype)
    ours = ops.swiglu(gate, torch.ones_like(gate))
    close(ours, F.silu(gate.double()), dtype)


@pytest.mark.usefixtures("cuda")
def test_rounds_between_the_two_steps() -> None:
    gate, up = randn(999, dtype=torch.bfloat16), randn(999, dtype=torch.bfloat16, seed=1)
    assert torch.equal(ops.swiglu(gate, up), F.silu(gate) * up)


@pytest.mark.usefixtures("cuda")
def test_nothing_to_do() -> None:
    packed = torch.empty(0, 8, requires_grad=True)
    ops.swiglu(packed).sum().backward()
    assert packed.grad is not None and ops.swiglu(packed).shape == (0, 4)


@pytest.mark.usefixtures("cuda")
def test_what_is_refused() -> None:
    for arguments, message in (
        ((randn(2, 7),), r"gate has shape \[2, 7\]; without up it takes an even last axis"),
        ((randn(2, 7), randn(7)), r"up has shape \[7\], gate \[2, 7\]; takes one shape"),
        ((randn(2), randn(2, dtype=torch.float16)), "up is torch.float16, gate torch.float32; takes one dtype"),
    ):
        with pytest.raises(DeviceError, match=f'swiglu on backend "cuda": {message}'):
            ops.swiglu(*arguments)
