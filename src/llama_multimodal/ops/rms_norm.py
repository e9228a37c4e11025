"""Root-mean-square layer normalisation (Zhang and Sennrich 2019), alone and behind a residual addition."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _dispatch


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps) · weight` over the last axis.

    x: [..., D], weight: [D] → [..., D] in x's dtype. The mean is taken in fp32, and the result is rounded to x's dtype
    *before* the weight is applied, as Meta's reference does it.
    """
    return _dispatch.call("rms_norm", _rms_norm, x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream's addition and the norm that reads it: `(rms_norm(sum), sum)`, sum = residual + x.

    x, residual: [..., D] of one dtype, weight: [D] → two of [..., D]. The sum is rounded to that dtype before the norm.
    """
    return _dispatch.call("add_rms_norm", _add_rms_norm, x, residual, weight, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    summed = residual + x
    return _rms_norm(summed, weight, eps), summed
