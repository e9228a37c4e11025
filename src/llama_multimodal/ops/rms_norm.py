"""Root-mean-square layer normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _dispatch


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps) · weight` over the last axis.

    x: [..., D], weight: [D] → [..., D] in x's dtype. The mean is taken in fp32, and the result is rounded to x's dtype
    *before* the weight is applied, as Meta's reference does it.
    """
    return _dispatch.choose("rms_norm", _torch)(x, weight, eps)


def _torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight
