"""Layers that several models share.

Shapes: N outputs · K inputs
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import PackedProduct, PackedWeight


class Linear(nn.Linear):
    """`nn.Linear` through `ops.linear`."""

    product: PackedProduct | None = None
    """What a packed layer computes. Blocks that have one for every layer decode through `ops.decode_blocks`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor, approximate: ops.Approximation = "none") -> Tensor:
        """The layer and the GELU behind it."""
        return ops.linear_gelu(x, self.weight, self.bias, approximate)


class Projections(nn.Module):
    """Linear layers without bias that read one input; packed, they run as one product (`quant.pack`)."""

    product: PackedProduct | None = None

    def __init__(self, size: int, **outputs: int) -> None:
        """outputs: how many outputs each layer has, by its name."""
        super().__init__()
        for name, count in outputs.items():
            self.add_module(name, Linear(size, count, bias=False))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """One [..., outputs] a layer, in their order."""
        return tuple(layer(x) for layer in self.children())


class PackedLinear(nn.Module):
    """A linear layer with a packed weight [N, K], or several of them whose outputs lie side by side.

    Stands in for a `Linear` (parts None), or for `Projections` (parts: how many outputs each layer has, by its name).
    """

    values: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None, parts: dict[str, int] | None = None) -> None:
        super().__init__()
        self.format, self.shape, self.group, self.layout = weight.format, weight.shape, weight.group, weight.layout
        self.parts = parts
        self.int8_activations = self.fp8_activations = False
        self._product: PackedProduct | None = None
        self._sizes = None if parts is None else tuple(parts.values())
        for name, tensor in (("values", weight.values), ("scales", weight.scales), ("zeros", weight.zeros)):
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> PackedWeight:
        """In the layout that this machine computes with."""
        return PackedWeight(self.format, self.shape, self.values, self.scales, self.zeros, self.group, self.layout)

    @property
    def product(self) -> PackedProduct | None:
        """What it computes, None with activations in fp8. Kept between calls, since a decoding step asks each layer for
        it."""
        if self.fp8_activations:
            return None
        kept = self._product
        if (
            kept is None
            or kept.weight.values is not self._buffers["values"]
            or kept.int8_activations != self.int8_activations
        ):
            self._product = kept = PackedProduct(self.weight, self.bias, self.int8_activations)
        return kept

    def _apply(self, *args: Any, **kwargs: Any) -> PackedLinear:
        self._product = None  # would keep what moves to another device here too
        return super()._apply(*args, **kwargs)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """[N, K] of the weight of each layer it stands for, by the parameter's name within this module."""
        if self.parts is None:
            return {"weight": self.shape}
        return {f"{part}.weight": (rows, self.shape[1]) for part, rows in self.parts.items()}

    def weights(self) -> dict[str, PackedWeight]:
        """The weights that `shapes` names, in the plain layout."""
        whole = ops.restore_weight(self.weight)
        rows = [shape[0] for shape in self.shapes.values()]
        cut = {name: tensor.split(rows) for name, tensor in whole.tensors().items()}
        return {
            name: dataclasses.replace(whole, shape=shape, **{key: pieces[i] for key, pieces in cut.items()})
            for i, (name, shape) in enumerate(self.shapes.items())
        }

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        product = self.product
        out = ops.fp8_linear(x, self.weight, self.bias) if product is None else product(x)
        return out if self._sizes is None else out.split(self._sizes, dim=-1)

    def extra_repr(self) -> str:
        outputs = self.shape[0] if self.parts is None else " + ".join(f"{n} {name}" for name, n in self.parts.items())
        rounding = ", 8-bit activations" if self.int8_activations or self.fp8_activations else ""
        return f"{self.shape[1]} → {outputs}, {self.format}{rounding}"


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
