"""Linear layers whose weight and input are floats of 8 bits (e4m3, Micikevicius et al. 2022), with a scale for each row
of either.

Shapes: T rows of x · N outputs · K inputs
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _dispatch
from .packed_linear import PackedWeight, packed_linear, round_to_fp8

_SIDES = 16  # what N and K must be multiples of on a GPU


def fp8_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`x · weightᵀ + bias` with x rounded by `round_to_fp8`; x: [..., K] → [..., N] in x's dtype.

    packed: in the format "fp8". A Hopper GPU or a later one multiplies bf16 x as fp8; elsewhere, and where gradients
    are recorded, what x was rounded to is multiplied in its own dtype.
    """
    return _dispatch.call("fp8_linear", _torch, x, packed, bias)


def _torch(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    values, scales = round_to_fp8(x)
    learns = torch.is_grad_enabled() and x.requires_grad
    if x.dtype != torch.bfloat16 or learns or not _multiplies_fp8(x.device) or any(n % _SIDES for n in packed.shape):
        rounded = (values.float() * scales).to(x.dtype)
        if learns:  # the gradient passes as if nothing was rounded
            rounded = x + (rounded - x).detach()
        return packed_linear(rounded, packed, bias)
    assert packed.scales is not None
    rows = values.view(-1, packed.shape[1])
    out = torch._scaled_mm(
        rows, packed.values.t(), scales.view(-1, 1), packed.scales.float().t(), out_dtype=torch.bfloat16
    ).view(*x.shape[:-1], packed.shape[0])
    return out if bias is None else out + bias.to(out.dtype)


@_dispatch.constant
def _multiplies_fp8(device: torch.device) -> bool:
    """Whether torch has a product of fp8 with a scale a row there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
