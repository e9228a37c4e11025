"""SwiGLU against fp64: two tensors and a packed one, strides, large values, gradients."""

from __future__ import annotations

import pytest
import torch

from backends.references import FLOATS, close, name_of, poisoned, randn, swiglu
from llama_multimodal import ops

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
SHAPES = [(1,), (3, 7), (2, 5, 33), (70, 3), (0, 4), (2, 2100)]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    gate, up = 3 * randn(*shape, dtype=dtype, device=device), randn(*shape, dtype=dtype, seed=1, device=device)
    expected = swiglu(gate, up)
    close(ops.swiglu(gate, up), expected, dtype)
    packed = torch.cat((gate, up), dim=-1)
    close(ops.swiglu(packed), expected, dtype)
    close(ops.swiglu(*packed.chunk(2, dim=-1)), expected, dtype)
    if gate.ndim > 1:
        close(ops.swiglu(poisoned(gate), up), expected, dtype)
        close(ops.swiglu(poisoned(packed)), expected, dtype)
        transposed = gate.transpose(0, -1).contiguous().transpose(0, -1)
        close(ops.swiglu(transposed, up), expected, dtype)


def test_values_past_where_exp_overflows(device: str) -> None:
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=device).requires_grad_()
    out = ops.swiglu(gate, torch.ones_like(gate))
    (grad,) = torch.autograd.grad(out.sum(), gate)
    assert out.tolist() == [0, pytest.approx(0, abs=1e-30), 0, 100, 1e4]
    assert grad.tolist() == [0, pytest.approx(0, abs=1e-30), 0.5, 1, 1]


@pytest.mark.slow
def test_gradients(device: str) -> None:
    gate, up = (randn(3, 5, dtype=torch.float64, seed=seed, device=device).requires_grad_() for seed in range(2))
    packed = randn(3, 8, dtype=torch.float64, device=device).requires_grad_()
    assert torch.autograd.gradcheck(ops.swiglu, (gate, up))
    assert torch.autograd.gradcheck(ops.swiglu, (packed,))
    assert torch.autograd.gradcheck(lambda gate, up: ops.swiglu(gate.t(), up.t()), (gate, up))


@each_dtype
@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
def test_gradients_of_each_dtype(dtype: torch.dtype, packed: bool, device: str) -> None:
    x, grad = randn(9, 66, dtype=dtype, device=device), randn(9, 33, dtype=dtype, seed=1, device=device)
    leaf = x.clone().requires_grad_()
    (ours,) = torch.autograd.grad(ops.swiglu(leaf) if packed else ops.swiglu(*leaf.chunk(2, -1)), leaf, grad)
    leaf = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(swiglu(*leaf.chunk(2, -1)), leaf, grad.double())
    close(ours, expected, dtype)
