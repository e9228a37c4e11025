"""A linear layer and GELU against fp64."""

from __future__ import annotations

import pytest
import torch

from backends.references import FLOATS, close, gelu, name_of, randn
from llama_multimodal import ops


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(9,), (5, 9), (2, 3, 9), (40, 9), (0, 9)], ids=str)
def test_linear_gelu(dtype: torch.dtype, approximate: str, bias: bool, shape: tuple[int, ...], device: str) -> None:
    x, weight = randn(*shape, dtype=dtype, device=device), randn(37, 9, dtype=dtype, seed=1, device=device) / 3
    shift = randn(37, dtype=dtype, seed=2, device=device) if bias else None
    wide = x.double() @ weight.double().T + (0 if shift is None else shift.double())
    close(ops.linear_gelu(x, weight, shift, approximate), gelu(wide, approximate), dtype, scale=2)


@pytest.mark.slow
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradients(approximate: str, bias: bool, device: str) -> None:
    x, weight, shift = (
        randn(*shape, dtype=torch.float64, seed=seed, device=device).requires_grad_()
        for seed, shape in enumerate([(2, 3, 5), (4, 5), (4,)])
    )
    leaves = (x, weight, shift) if bias else (x, weight)
    assert torch.autograd.gradcheck(lambda x, w, b=None: ops.linear_gelu(x, w, b, approximate), leaves)


def test_large_values(device: str) -> None:
    """tanh by way of a power of e, which overflows for a large negative value."""
    x = torch.tensor([[-1e3], [1e3]], device=device)
    for approximate in ("none", "tanh"):
        assert ops.linear_gelu(x, torch.ones(1, 1, device=device), None, approximate).tolist() == [[0], [1e3]]
