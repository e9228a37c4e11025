"""rms_norm and add_rms_norm in CUDA C++ against fp64, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.errors import DeviceError

from .. import references
from ..references import FLOATS, close, name_of, randn
from .conftest import Guards

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
# A part of a warp, whole warps, several blocks, rows too long for registers; aligned and not.
SHAPES = [
    (1,), (7,), (33, 8), (5, 3, 64), (2, 1, 33), (17, 128), (2, 576), (1, 2, 1, 2, 100), (3, 4096), (2, 4100),
    (1, 16384), (1, 33000),
]  # fmt: skip


def values(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, a residual and a weight."""
    return 3 * randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1), randn(shape[-1], dtype=dtype, seed=2)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(dtype: torch.dtype, shape: tuple[int, ...], order: None, guards: Guards) -> None:
    x, residual, weight = (guards.input(t) for t in values(shape, dtype))
    close(ops.rms_norm(x, weight, 1e-5), references.rms_norm(x, weight, 1e-5), dtype)
    normed, summed = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(summed, residual + x)
    assert torch.equal(normed, ops.rms_norm(summed, weight, 1e-5))


@pytest.mark.usefixtures("cuda")
@each_dtype
@pytest.mark.parametrize("size", [8, 40, 256])
def test_any_place_in_memory(dtype: torch.dtype, size: int, guards: Guards) -> None:
    """Rows with gaps, heads that are transposed, columns apart, one row for all, and memory that is not aligned."""
    weight = guards.input(randn(size, dtype=dtype, seed=1))
    packed = guards.input(randn(2, 3, 4 * size, dtype=dtype))
    heads = packed[..., size:].unflatten(-1, (3, size)).transpose(1, 2)  # [2, 3, 3, size]
    apart = guards.input(randn(3, size, 2, dtype=dtype))[..., 1]
    same = guards.input(randn(1, size, dtype=dtype)).expand(5, size)
    shifted = guards.input(randn(3, size, dtype=dtype), offset=1)
    for x in (packed[..., :size], heads, apart, same, shifted):
        expected = references.rms_norm(x, weight, 1e-5)
        close(ops.rms_norm(x, weight, 1e-5), expected, dtype)
        residual = randn(*x.shape, dtype=dtype, seed=2)
        normed, summed = ops.add_rms_norm(x, residual, weight, 1e-5)
        assert torch.equal(summed, residual + x) and torch.equal(normed, ops.rms_norm(summed, weight, 1e-5))


@pytest.mark.usefixtures("cuda")
def test_rounds_before_the_weight() -> None:
    x, weight = randn(4, 64, dtype=torch.bfloat16), randn(64, dtype=torch.bfloat16, seed=1)
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).bfloat16()
    assert torch.equal(ops.rms_norm(x, weight, 1e-5), normed * weight)


@pytest.mark.usefixtures("cuda")
def test_nothing_to_do() -> None:
    weight = randn(8)
    assert ops.rms_norm(torch.empty(0, 8), weight, 1e-5).shape == (0, 8)
    x = torch.empty(0, 8, requires_grad=True)
    weight.requires_grad_()
    ops.rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None and weight.grad is not None and (weight.grad == 0).all()


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(dtype: torch.dtype, shape: tuple[int, ...], order: None, guards: Guards) -> None:
    x, residual, weight = (guards.input(t).requires_grad_() for t in values(shape, dtype))
    grads = [guards.input(randn(*shape, dtype=dtype, seed=seed)) for seed in (3, 4)]
    normed, summed = ops.add_rms_norm(x, residual, weight, 1e-5)
    ours = torch.autograd.grad((normed, summed), (x, residual, weight), grads)
    # The sum as it was rounded, so that the gradients are taken at the same point.
    leaves = [t.detach().double().requires_grad_() for t in (summed, weight)]
    wide = references.rms_norm(*leaves, 1e-5)
    to_sum, to_weight = torch.autograd.grad(wide, leaves, grads[0].double())
    scale = float(wide.detach().abs().amax().clamp(min=1))  # the weight's gradient adds up over the rows
    for got in ours[:2]:
        close(got, to_sum + grads[1].double(), dtype, 2)
    close(ours[2], to_weight, dtype, scale * 2)


@pytest.mark.usefixtures("cuda")
@each_dtype
def test_backward_of_one_output_and_of_any_place(dtype: torch.dtype) -> None:
    weight = randn(48, dtype=dtype, seed=1).requires_grad_()
    base = randn(2, 5, 3, 64, dtype=dtype)
    x = base[..., 16:].transpose(1, 2).detach().requires_grad_()
    (alone,) = torch.autograd.grad(ops.rms_norm(x, weight, 1e-5).sum(), x)  # the gradient is one expanded value
    leaf = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(references.rms_norm(leaf, weight.detach(), 1e-5).sum(), leaf)
    close(alone, expected, dtype, 2)
    residual = torch.zeros_like(x, requires_grad=True)
    normed, summed = ops.add_rms_norm(x, residual, weight, 1e-5)
    only_norm = torch.autograd.grad(normed.sum(), (x, residual), retain_graph=True)
    assert torch.equal(only_norm[0], alone) and torch.equal(only_norm[1], alone)
    only_sum = torch.autograd.grad(summed, (x, residual, weight), torch.ones_like(summed), allow_unused=True)
    assert (only_sum[0] == 1).all() and (only_sum[1] == 1).all() and only_sum[2] is None


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    "x, weight, message",
    [
        (randn(2, 8), randn(4), r"weight has shape \[4\], x \[2, 8\]; takes one value for each column"),
        (randn(2, 8), randn(8, dtype=torch.bfloat16), "weight is torch.bfloat16, x torch.float32; takes one dtype"),
        (randn(2, 8, dtype=torch.float64), randn(8, dtype=torch.float64), "x is torch.float64; takes float32"),
    ],
)
def test_what_is_refused(x: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(DeviceError, match=f'rms_norm on backend "cuda": {message}'):
        ops.rms_norm(x, weight, 1e-5)
    with pytest.raises(DeviceError, match=r"residual has shape \[8\], x \[2, 8\]; takes one shape"):
        ops.add_rms_norm(randn(2, 8), randn(8), randn(8), 1e-5)
