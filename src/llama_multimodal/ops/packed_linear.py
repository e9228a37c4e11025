"""Linear layers whose weights are packed once: bf16; int8 and int4 with a scale for every group of a row; fp8 with one
for every row.

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

Format = Literal["bf16", "int8", "int4", "fp8"]
INTEGERS: tuple[Format, ...] = ("int8", "int4")
"""The formats in groups, which kernels read; fp8 is widened by torch, block by block."""
_LIMITS = {"int8": (-128, 127), "int4": (0, 15)}  # of what is stored
_MIDDLE = {"int8": 0, "int4": 8}  # what a symmetric weight's zero is stored as
_VALUES_AT_ONCE = 1 << 20  # of a weight that are rounded together
_FP8 = torch.float8_e4m3fn
_FP8_LARGEST = torch.finfo(_FP8).max  # 448
ACTIVATION_BLOCK = 32
"""Inputs that share a step where activations are rounded to 8 bits; groups are then of a multiple of it."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K], value = (stored - zero) · scale, in the plain layout or in one that a kernel prefers.

    values: plain: bf16 [N, K] · int8 [N, K] · int4: uint8 [N, K/2], the even column in the low four bits · fp8:
    float8_e4m3fn [N, K]. scales: fp16 [N, K/G]; fp32 [N, 1] for fp8; None for bf16. zeros: int8 or uint8 [N, K/G], as
    stored; None where every zero is the middle (0 for int8 and fp8, 8 for int4).
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
    range, and the scale is set by the largest magnitude; otherwise by the group's least and largest values. fp8 has
    a scale a row and is symmetric, whatever these two say.

    Raises:
        ValueError: not a matrix, K not a multiple of `group`, an odd K for int4, a value that is not finite, or a
            scale past what fp16 holds.
    """
    if weight.ndim != 2:
        raise ValueError(f"pack_weight takes a matrix [N, K], not shape {tuple(weight.shape)}")
    columns = weight.shape[1]
    if not divides(columns, format, group):
        raise ValueError(f"pack_weight: {columns} columns cannot be packed as {format} in groups of {group}")
    # A share of the rows at a time: an LM head in fp32, several times over, would be more than the rest of the model.
    shares = weight.split(max(1, _VALUES_AT_ONCE // max(1, columns)))
    packed = _pack_rows(shares[0], format, group, symmetric)
    if len(shares) == 1:
        return packed
    whole = packed.mapped(lambda tensor: tensor.new_empty(len(weight), *tensor.shape[1:]))
    for i, rows in enumerate(shares):
        share = _pack_rows(rows, format, group, symmetric).tensors()
        for name, tensor in whole.tensors().items():
            tensor[i * len(shares[0]) :][: len(rows)] = share[name]
    return replace(whole, shape=(len(weight), columns))


def _pack_rows(weight: Tensor, format: Format, group: int, symmetric: bool) -> PackedWeight:
    rows, columns = weight.shape
    if not weight.is_meta and not _is_finite(weight):
        raise ValueError("pack_weight: the weight holds values that are not finite")
    if format == "bf16":
        return PackedWeight("bf16", (rows, columns), weight.to(torch.bfloat16).contiguous())
    if format == "fp8":
        values, steps = round_to_fp8(weight)
        return PackedWeight("fp8", (rows, columns), values, steps, group=columns)
    groups = weight.float().view(rows, -1, group)  # [N, K/G, G]
    grid = Grid.of(groups, format, symmetric)
    if not weight.is_meta and bool(torch.isinf(grid.scales).any()):
        raise ValueError("pack_weight: the weight's values are too large for a scale in fp16")
    return grid.packed(grid.stored(groups))


def round_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] → float8_e4m3fn [..., K] and its scales, fp32 [..., 1]: a row's largest magnitude becomes 448."""
    wide = x.float()
    scales = (wide.abs().amax(-1, keepdim=True) / _FP8_LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / scales).clamp(-_FP8_LARGEST, _FP8_LARGEST).to(_FP8), scales


def _is_finite(weight: Tensor) -> bool:
    """In one pass, where `torch.isfinite` makes several tensors of the weight's size and takes twelve times as long."""
    return weight.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all())


def divides(columns: int, format: Format, group: int) -> bool:
    """Whether rows of `columns` values can be packed as `format` in groups of `group`."""
    if format not in INTEGERS:
        return True
    return group >= 1 and columns % group == 0 and not (format == "int4" and columns % 2)


@dataclass(frozen=True)
class Grid:
    """The values that int8 or int4 can hold for each group of a weight: (whole number - zero) · scale.

    scales: fp16 [N, K/G] · zeros: fp32 [N, K/G], whole numbers as they are stored
    """

    format: Format
    symmetric: bool
    scales: Tensor
    zeros: Tensor

    @classmethod
    def of(cls, groups: Tensor, format: Format, symmetric: bool, shrink: Tensor | float = 1.0) -> Grid:
        """The grid that reaches as far as the values of groups [N, K/G, G].

        shrink: a factor to that reach, one for all or [N, K/G]; below 1 the outermost values are cut off
        """
        low, high = _LIMITS[format]
        if symmetric:
            middle = _MIDDLE[format]
            scales = (groups.abs().amax(-1) / (high - middle) * shrink).to(torch.float16)
            return cls(format, True, scales, torch.full_like(scales, middle, dtype=torch.float32))
        least, most = groups.amin(-1).clamp(max=0) * shrink, groups.amax(-1).clamp(min=0) * shrink
        scales = ((most - least) / (high - low)).to(torch.float16)
        grid = cls(format, False, scales, torch.zeros_like(scales, dtype=torch.float32))
        return replace(grid, zeros=(low - least / grid.steps).round().clamp(low, high))

    @property
    def steps(self) -> Tensor:
        """What is divided by: the scales, in fp32 and above zero."""
        return self.scales.float().clamp(min=torch.finfo(torch.float16).tiny)

    def stored(self, groups: Tensor) -> Tensor:
        """The nearest whole numbers for values [N, K/G, G], in fp32."""
        whole = (groups / self.steps[..., None]).round() + self.zeros[..., None]
        return whole.clamp(*_LIMITS[self.format])

    def values(self, stored: Tensor) -> Tensor:
        """What they stand for."""
        return (stored - self.zeros[..., None]) * self.scales.float()[..., None]

    def packed(self, stored: Tensor) -> PackedWeight:
        """A weight in the plain layout from whole numbers [N, K/G, G]."""
        rows, groups, group = stored.shape
        stored, small = stored.reshape(rows, -1), torch.int8 if self.format == "int8" else torch.uint8
        values = stored.to(small) if self.format == "int8" else join_nibbles(stored.to(small))
        zeros = None if self.symmetric else self.zeros.to(small)
        return PackedWeight(self.format, (rows, groups * group), values.contiguous(), self.scales, zeros, group)


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
    if packed.format == "fp8":
        return values.float() * packed.scales
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

    int8_activations: round x too, see `round_activations`. A CPU is faster at it then, with many rows as well; one with
    AMX takes 24 rows and more of bf16 as they are, which is faster still.
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
