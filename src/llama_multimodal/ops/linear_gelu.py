"""A linear layer and the GELU behind it, as in a vision encoder's feed-forward block and in projectors."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch
from .linear import linear

Approximation = Literal["none", "tanh"]


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: Approximation = "none") -> Tensor:
    """`gelu(x · weightᵀ + bias)`; x: [..., K], weight: [N, K], bias: [N] → [..., N] in x's dtype.

    approximate: "none" is the exact GELU of Llama 3.2 Vision, "tanh" the one of SigLIP (Hendrycks and Gimpel 2016).
    """
    return _dispatch.call("linear_gelu", _torch, x, weight, bias, approximate)


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: Approximation) -> Tensor:
    product = linear(x, weight, bias)
    if product.requires_grad:
        return F.gelu(product, approximate=approximate)
    return torch.ops.aten.gelu_(product, approximate=approximate)  # the product is the largest tensor of a block
