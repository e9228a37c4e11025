"""The original's `fused_cuda`, through `ops` and so with kernels where there are any."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..errors import ConfigError


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) · up`, elementwise; both [..., F] → [..., F].

    Raises:
        ConfigError: shapes that do not go together.
    """
    if gate.shape != up.shape:
        raise ConfigError(f"swiglu: gate has shape {list(gate.shape)} and up {list(up.shape)}; they must be equal")
    return ops.swiglu(gate, up)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: ops.Approximation = "none"
) -> Tensor:
    """The projector's linear layer and activation, `gelu(x · weightᵀ + bias)`; x: [..., K], weight: [N, K] → [..., N].

    Raises:
        ConfigError: shapes that do not go together, or an approximation other than "none" and "tanh".
    """
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = f"x {list(x.shape)}, weight {list(weight.shape)}" + (
            "" if bias is None else f", bias {list(bias.shape)}"
        )
        raise ConfigError(f"linear_gelu: {shapes} do not go together; weight must be [outputs, inputs], bias [outputs]")
    if approximate not in ("none", "tanh"):
        raise ConfigError(f'linear_gelu: approximate "{approximate}" is neither "none" nor "tanh"')
    return ops.linear_gelu(x, weight, bias, approximate)
