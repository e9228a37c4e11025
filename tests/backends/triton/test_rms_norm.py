"""RMSNorm against fp64: dtypes, shapes, strides, gradients."""

from __future__ import annotations

import pytest
import torch

from backends.references import FLOATS, close, name_of, poisoned, randn, rms_norm
from llama_multimodal import ops

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
SHAPES = [(1,), (7,), (3, 5), (2, 1, 33), (2, 3, 4, 129), (37, 64), (0, 8), (1, 1000)]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    x, weight = 3 * randn(*shape, dtype=dtype, device=device), randn(shape[-1], dtype=dtype, seed=1, device=device)
    close(ops.rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5), dtype)


@each_dtype
def test_a_row_longer_than_a_block(dtype: torch.dtype, device: str) -> None:
    """Read in two passes; the second half is larger, so that a sum over the first alone would show."""
    x, weight = randn(2, 8195, dtype=dtype, device=device), randn(8195, dtype=dtype, seed=1, device=device)
    x[:, 4000:] *= 3
    close(ops.rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5), dtype)
    residual = randn(2, 8195, dtype=dtype, seed=2, device=device)
    normed, summed = ops.add_rms_norm(x, residual, weight, 1e-5)
    close(normed, rms_norm(summed, weight, 1e-5), dtype)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    x, residual = randn(*shape, dtype=dtype, device=device), randn(*shape, dtype=dtype, seed=1, device=device)
    weight = randn(shape[-1], dtype=dtype, seed=2, device=device)
    normed, summed = ops.add_rms_norm(x, residual, weight, 1e-5)
    close(summed, x.double() + residual.double(), dtype)
    close(normed, rms_norm(summed, weight, 1e-5), dtype)


@each_dtype
def test_strides(dtype: torch.dtype, device: str) -> None:
    """Transposed heads, rows of a larger tensor, and a last axis that is not the innermost."""
    x, weight = randn(2, 5, 3, 8, dtype=dtype, device=device), randn(8, dtype=dtype, seed=1, device=device)
    residual = randn(2, 3, 5, 8, dtype=dtype, seed=2, device=device)
    for view in (x.transpose(1, 2), poisoned(x), randn(8, 6, dtype=dtype, device=device).t()):
        close(ops.rms_norm(view, weight, 1e-5), rms_norm(view, weight, 1e-5), dtype)
    heads = x.transpose(1, 2)
    assert ops.rms_norm(heads, weight, 1e-5).stride() == heads.stride()
    normed, summed = ops.add_rms_norm(heads, residual, weight, 1e-5)
    close(summed, heads.double() + residual.double(), dtype)
    close(normed, rms_norm(summed, weight, 1e-5), dtype)


def test_the_sum_is_rounded_before_the_norm(device: str) -> None:
    """1 + 2⁻¹² is 1 in fp16: the norm must not see what the sum does not hold."""
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float16, device=device)
    residual = torch.tensor([[2.0**-12, -0.5]], dtype=torch.float16, device=device)
    weight = torch.ones(2, dtype=torch.float16, device=device)
    normed, summed = ops.add_rms_norm(x, residual, weight, 0.0)
    assert torch.equal(summed, torch.tensor([[1.0, 0.5]], dtype=torch.float16, device=device))
    assert torch.equal(normed, ops.rms_norm(summed, weight, 0.0))


def test_large_half_values_do_not_overflow(device: str) -> None:
    x = torch.full((1, 8), 1000.0, dtype=torch.float16, device=device)
    weight = torch.ones(8, dtype=torch.float16, device=device)
    assert torch.equal(ops.rms_norm(x, weight, 1e-5), torch.ones_like(x))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 5)], ids=str)
def test_gradients(shape: tuple[int, ...], device: str) -> None:
    x, residual, weight = (
        randn(*part, dtype=torch.float64, seed=seed, device=device).requires_grad_()
        for seed, part in enumerate((shape, shape, shape[-1:]))
    )
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, 1e-2), (x, weight))
    assert torch.autograd.gradcheck(lambda *inputs: ops.add_rms_norm(*inputs, 1e-2), (x, residual, weight))


@each_dtype
@pytest.mark.parametrize("used", ["norm", "sum", "both"])
@pytest.mark.parametrize("shape", [(9, 40), (37, 700)], ids=["one block", "several blocks a program"])
def test_gradients_of_each_output(dtype: torch.dtype, used: str, shape: tuple[int, int], device: str) -> None:
    leaves = [randn(*shape, dtype=dtype, seed=seed, device=device) for seed in range(2)]
    leaves.append(randn(shape[1], dtype=dtype, seed=2, device=device))
    grads = [randn(*shape, dtype=dtype, seed=seed, device=device) for seed in (3, 4)]

    def backward(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        wide = x.dtype == torch.float64
        summed = residual + x
        normed = rms_norm(summed, weight, 1e-5) if wide else None
        if not wide:
            normed, summed = ops.add_rms_norm(x, residual, weight, 1e-5)
        outputs = {"norm": [normed], "sum": [summed], "both": [normed, summed]}[used]
        wanted = {"norm": grads[:1], "sum": grads[1:], "both": grads}[used]
        return torch.autograd.grad(outputs, (x, residual, weight), [g.to(x.dtype) for g in wanted], allow_unused=True)

    ours = backward(*(leaf.clone().requires_grad_() for leaf in leaves))
    expected = backward(*(leaf.double().requires_grad_() for leaf in leaves))
    for got, want in zip(ours, expected):
        if want is None:  # the sum does not depend on the weight
            assert got is None or not got.any()
        else:
            close(got, want, dtype, scale=3)


@each_dtype
def test_gradients_of_strided_rows(dtype: torch.dtype, device: str) -> None:
    x, weight = randn(2, 5, 3, 8, dtype=dtype, device=device), randn(8, dtype=dtype, seed=1, device=device)
    grad = randn(2, 3, 5, 8, dtype=dtype, seed=2, device=device)
    leaf, scale = x.clone().requires_grad_(), weight.clone().requires_grad_()
    ours = torch.autograd.grad(ops.rms_norm(leaf.transpose(1, 2), scale, 1e-5), (leaf, scale), grad)
    leaf, scale = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = torch.autograd.grad(rms_norm(leaf.transpose(1, 2), scale, 1e-5), (leaf, scale), grad.double())
    for got, want in zip(ours, expected):
        close(got, want, dtype, scale=3)
