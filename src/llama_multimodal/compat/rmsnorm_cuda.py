"""The original's `rmsnorm_cuda`, through `ops.rms_norm` and so with a kernel where there is one."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..errors import ConfigError


def forward(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Root-mean-square normalisation over the last axis; x: [..., D], weight: [D] → [..., D].

    Raises:
        ConfigError: shapes that do not go together.
    """
    if weight.shape != x.shape[-1:]:
        raise ConfigError(f"rmsnorm: weight has shape {list(weight.shape)} and x {list(x.shape)}; weight must be [D]")
    return ops.rms_norm(x, weight, eps)
