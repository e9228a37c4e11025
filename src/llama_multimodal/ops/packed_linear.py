"""Linear layers whose weights are packed once: bf16, or int8 and int4 with a scale for every group of a row.

Shapes: N outputs · K inputs · G values of a group · T rows of x
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from . import _dispatch
from .linear import linear

Format = Literal["bf16", "int8", "int4"]
_LIMITS = {"int8": (-128, 127), "int4": (0, 15)}  # of what is stored
_MIDDLE = {"int8": 0, "int4": 8}  # what a symmetric weight's zero is stored as
ACTIVATION_BLOCK = 32
"""Inputs that share a step where activations are rounded to 8 bits; groups are then of a multiple of it."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K], value = (stored - zero) · scale, in the plain layout or in one that a kernel prefers.

    values: plain: bf16 [N, K] · int8 [N, K] · int4: uint8 [N, K/2], the even column in the low four bits.
    scales: fp16 [N, K/G]; None for bf16. zeros: int8 or uint8 [N, K/G], as stored; None where every zero is the
    middle (0 for int8, 8 for int4).
    layout: "plain", or the name that a backend gave what it laid out for itself.
    """

    format: Format
    shape: tuple[int, int]
    values: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    group: int = 0
    layout: str = "plain"

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Those of values, scales and zeros that there are."""
        found = {"values": self.values, "scales": self.scales, "zeros": self.zeros}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, device: torch.device) -> PackedWeight:
        return self.mapped(lambda tensor: tensor.to(device))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> PackedWeight:
        """With each of its tensors changed."""
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)


def pack_weight(weight: Tensor, format: Format, *, group: int = 32, symmetric: bool = True) -> PackedWeight:
    """Round a weight [N, K] to `format`, in the plain layout.

    group: values of a row that share a scale; K must be a multiple of it. symmetric: the zero is the middle of the
    range, and the scale is set by the largest magnitude; otherwise by the group's least and largest values.

    Raises:
        ValueError: not a matrix, K not a multiple of `group`, an odd K for int4, a value that is not finite, or a
            scale past what fp16 holds.
    """
    if weight.ndim != 2:
        raise ValueError(f"pack_weight takes a matrix [N, K], not shape {tuple(weight.shape)}")
    rows, columns = weight.shape
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise ValueError("pack_weight: the weight holds values that are not finite")
    if format == "bf16":
        return PackedWeight("bf16", (rows, columns), weight.to(torch.bfloat16).contiguous())
    if group < 1 or columns % group or (format == "int4" and columns % 2):
        raise ValueError(f"pack_weight: {columns} columns cannot be packed as {format} in groups of {group}")
    low, high = _LIMITS[format]
    grouped = weight.float().view(rows, -1, group)  # [N, K/G, G]
    if symmetric:
        middle = _MIDDLE[format]
        scales = grouped.abs().amax(-1) / (high - middle)
    else:
        least, most = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = (most - least) / (high - low)
    if not weight.is_meta and bool((scales > torch.finfo(torch.float16).max).any()):
        raise ValueError("pack_weight: the weight's values are too large for a scale in fp16")
    scales = scales.to(torch.float16)
    step = scales.float().clamp(min=torch.finfo(torch.float16).tiny)[..., None]
    if symmetric:
        zeros, zero = None, float(middle)
        stored = (grouped / step).round() + zero
    else:
        shift = (low - least[..., None] / step).round().clamp(low, high)
        zeros = shift[..., 0].to(torch.int8 if format == "int8" else torch.uint8)
        stored = (grouped / step).round() + shift
    stored = stored.clamp(low, high).view(rows, columns)
    values = stored.to(torch.int8) if format == "int8" else join_nibbles(stored.to(torch.uint8))
    return PackedWeight(format, (rows, columns), values.contiguous(), scales, zeros, group)


def join_nibbles(values: Tensor) -> Tensor:
    """Two 4-bit values to a byte, the even column in the low bits: uint8 [N, K] → [N, K/2]"""
    return values[:, ::2] | values[:, 1::2] << 4


def split_nibbles(values: Tensor) -> Tensor:
    """The reverse of `join_nibbles`: uint8 [N, K/2] → [N, K]"""
    return torch.stack((values & 15, values >> 4), dim=-1).flatten(1)


def unpack_weight(packed: PackedWeight) -> Tensor:
    """The fp32 values [N, K] that a packed weight stands for."""
    packed = restore_weight(packed)
    if packed.scales is None:
        return packed.values.float()
    values = packed.values
    if packed.format == "int4":
        values = split_nibbles(values)
    grouped = values.float().view(packed.shape[0], -1, packed.group)
    zeros = _MIDDLE[packed.format] if packed.zeros is None else packed.zeros.float()[..., None]
    return ((grouped - zeros) * packed.scales.float()[..., None]).view(packed.shape)


def prepare_weight(packed: PackedWeight) -> PackedWeight:
    """The same weight in the layout that this machine's kernel for it reads fastest; plain where there is none."""
    return _dispatch.call("prepare_weight", _prepare, packed.values, packed)


RESTORED: dict[str, Callable[[PackedWeight], PackedWeight]] = {}
"""Back to the plain layout, by the name of a layout; whoever lays weights out in his own way adds his."""


def restore_weight(packed: PackedWeight) -> PackedWeight:
    """The same weight in the plain layout: what `prepare_weight` did is undone, bit for bit."""
    return packed if packed.layout == "plain" else RESTORED[packed.layout](packed)


def packed_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None = None, int8_activations: bool = False
) -> Tensor:
    """`x · weightᵀ + bias`; x: [..., K] → [..., N] in x's dtype. Made for few rows; many gain nothing by it.

    int8_activations: round x too, see `round_activations`. A CPU is faster at it then, with many rows as well.
    """
    return _dispatch.call("packed_linear", _torch, x, packed, bias, int8_activations)


def round_activations(x: Tensor) -> Tensor:
    """x [..., K] in blocks of 32, each value a whole multiple, -127 to 127, of 1/127 of its block's largest; in fp32.

    A block with inf or NaN is NaN; one whose largest magnitude is below 1e-30 counts as zeros.

    Raises:
        ValueError: K is not a multiple of 32.
    """
    if x.ndim == 0 or x.shape[-1] % ACTIVATION_BLOCK:
        raise ValueError(f"8-bit activations take x with a multiple of {ACTIVATION_BLOCK} inputs, not {list(x.shape)}")
    blocks = x.float().unflatten(-1, (-1, ACTIVATION_BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    step = torch.where(largest < 1e-30, 0.0, largest / 127)
    scaled = blocks * torch.where(step > 0, 1 / step, 0.0)
    whole = (scaled + torch.where(scaled < 0, -0.5, 0.5)).trunc().clamp(-127, 127)
    return (whole * torch.where(largest.isfinite(), step, torch.nan)).flatten(-2)


def _prepare(values: Tensor, packed: PackedWeight) -> PackedWeight:
    return replace(packed, values=values)


def _torch(x: Tensor, packed: PackedWeight, bias: Tensor | None, int8_activations: bool) -> Tensor:
    if not int8_activations:
        return linear(x, unpack_weight(packed).to(x.dtype), bias)
    rounded = x.float() + (round_activations(x) - x.float()).detach()  # the gradient passes as if nothing was rounded
    return linear(rounded, unpack_weight(packed), None if bias is None else bias.float()).to(x.dtype)
