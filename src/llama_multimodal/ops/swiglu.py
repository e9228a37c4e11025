"""The gate of Llama's feed-forward block (Shazeer 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import _dispatch


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """`silu(gate) · up`, elementwise; both [..., F] → [..., F].

    Without `up`, gate is [..., 2F] and holds both, gate first: what one product with stacked weights gives.
    """
    return _dispatch.call("swiglu", _torch, gate, up)


def _torch(gate: Tensor, up: Tensor | None) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return F.silu(gate) * up
