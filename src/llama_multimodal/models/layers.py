"""Layers that several models share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops


class Linear(nn.Linear):
    """`nn.Linear` through `ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Projections(nn.Module):
    """Linear layers without bias that read one input; packed, they run as one product (`quant.pack`)."""

    def __init__(self, size: int, **outputs: int) -> None:
        """outputs: how many outputs each layer has, by its name."""
        super().__init__()
        for name, count in outputs.items():
            self.add_module(name, Linear(size, count, bias=False))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """One [..., outputs] a layer, in their order."""
        return tuple(layer(x) for layer in self.children())


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of `residual + x`, and the sum."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, H·D] → [B, H, T, D]"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, T, D] → [B, T, H·D]"""
    return x.transpose(1, 2).flatten(2)
