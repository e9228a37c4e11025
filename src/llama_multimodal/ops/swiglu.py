"""The gate of Llama's feed-forward block (Shazeer 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import _dispatch


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) · up`, elementwise; both [..., F] → [..., F]."""
    return _dispatch.choose("swiglu", _torch)(gate, up)


def _torch(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up
