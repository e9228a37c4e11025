"""Products of fp8 weights and fp8 activations: what they are rounded to, on a CPU and as a GPU is asked for them."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.ops import round_to_fp8

FP8 = torch.float8_e4m3fn


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def every_value() -> Tensor:
    """All finite values of e4m3, in order."""
    values = torch.arange(256, dtype=torch.uint8).view(FP8).double()
    return values[values.isfinite()].unique()


def expected(x: Tensor, packed: ops.PackedWeight, bias: Tensor | None) -> Tensor:
    """In fp64, with x rounded to the nearest of `every_value` times its row's scale."""
    scales = x.double().abs().amax(-1, keepdim=True).float().double() / 448
    grid = every_value()
    near = (x.double() / scales)[..., None].sub(grid).abs().argmin(-1)
    out = (grid[near] * scales) @ ops.unpack_weight(packed).double().t()
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["widened", "as on a GPU"])
def test_product(shape: tuple[int, ...], dtype: torch.dtype, scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if scaled:
        monkeypatch.setattr(sys.modules[ops.fp8_linear.__module__], "_multiplies_fp8", lambda device: True)
    packed = ops.pack_weight(randn(48, 64, seed=1), "fp8")
    x = (randn(*shape) * torch.logspace(-3, 3, 64)).to(dtype)
    bias = randn(48, seed=2).to(dtype)
    for added in (None, bias):
        wanted = expected(x, packed, added)
        found = ops.fp8_linear(x, packed, added)
        assert found.dtype == dtype and found.shape == wanted.shape
        assert (found.double() - wanted).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-5) * wanted.norm()
        assert (ops.packed_linear(x, packed, added).double() - wanted).norm() > 1e-2 * wanted.norm()


def test_rounding_of_what_is_extreme() -> None:
    x = torch.stack((torch.zeros(16), torch.full((16,), 3e38), torch.full((16,), 1e-38), torch.full((16,), torch.nan)))
    values, scales = round_to_fp8(x)
    restored = values.float() * scales
    assert torch.equal(restored[0], x[0]) and torch.allclose(restored[1], x[1]) and restored[3].isnan().all()
    assert scales.shape == (4, 1) and (restored[2] - x[2]).abs().max() < 1e-38


def test_gradients_pass_as_if_nothing_was_rounded() -> None:
    packed = ops.pack_weight(randn(32, 64, seed=1), "fp8")
    x = randn(3, 64).requires_grad_()
    out = ops.fp8_linear(x, packed)
    out.backward(torch.ones_like(out))
    assert x.grad is not None
    assert torch.allclose(x.grad, ops.unpack_weight(packed).sum(0).expand(3, -1), atol=1e-5)
