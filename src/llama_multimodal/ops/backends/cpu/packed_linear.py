"""`packed_linear` on CPUs: few rows read the weight once; many rows take it block by block through torch's product, or,
in bf16 where there is AMX, through a kernel for its matrix unit.

Shapes: N outputs · K inputs · G values of a group · T rows of x

bf16 weights stay as they lie, [N, K], and their products are fp32 sums of exact values. int8 and int4 weights lie in
tiles of 16 outputs, so that a lane of a vector is an output, and meet x in whole numbers: each row of x is rounded, by
blocks of 32 inputs, to 14 bits (bf16) or 23 (fp32, fp16) below the block's largest value, so bf16 values down to 1/64
of that one stay exact. Measured over normal values, K from 64 to 8192, relative
to |x| and the weight's root mean square, the sums are off by at most 3e-5 (bf16, whose rounding of the results makes
1.6e-3 on average) and 2e-6 (fp32, where torch's own products are off by as much). Every instruction set sums the same
whole numbers. A row that holds inf or NaN gives NaN. Where 8-bit activations are asked for, x is rounded to those
instead, and the kernel takes any number of rows.

On a matrix unit, from 8 rows of bf16 on (24 with 8-bit activations), the weight is rounded to bf16 and x stays as it
is, but for denormals, which count as zeros: as torch does with many rows on any CPU that multiplies bf16.
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import replace

import torch
from torch import Tensor

from ... import _dispatch
from ...linear import cpu_gains_by, linear, linear_in_blocks
from ...packed_linear import INTEGERS, RESTORED, PackedWeight, join_nibbles, split_nibbles, unpack_weight
from ..operators import define
from .library import DTYPES, functions, has_tile_linear, instruction_set, pointer

LAYOUT = "cpu tiles"
_ROUNDED_AT_ONCE = 1024  # rows of x, whose rounded values take 2 bytes each
_TILE, _BLOCK = 16, 32  # outputs that lie interleaved, inputs that are rounded together
# Rows up to which a kernel is faster than torch's product, on the instruction set's kind of machine.
_FEW_BF16 = {"amx": 4, "avx512": 4, "avx2": 8, "plain": 2}
# Of a bf16 weight where bf16 products are slower than fp32 ones:
_FEW_WIDENED = {"amx": 32, "avx512": 56, "avx2": 32, "plain": 2}
_FEW_INTEGER = {"amx": 96, "avx512": 96, "avx2": 24, "plain": 2}


def few_rows(format: str) -> int:
    """Rows of x up to which the kernel for few is the faster one with a weight of this format."""
    if format != "bf16":
        return _FEW_INTEGER[instruction_set()]
    return (_FEW_BF16 if cpu_gains_by(torch.bfloat16) else _FEW_WIDENED)[instruction_set()]


def most_rows(format: str, dtype: torch.dtype, inputs: int) -> int:
    """Rows of x in a dtype up to which the kernels are used: few, or any number on a matrix unit."""
    return sys.maxsize if dtype == torch.bfloat16 and has_tile_linear(inputs) else few_rows(format)


@_dispatch.register("prepare_weight", "cpu")
def prepare_weight(values: Tensor, packed: PackedWeight) -> PackedWeight:
    """int8 and int4 in groups of a multiple of 32 are laid out in tiles; anything else stays as it is.

    values: [N/16, K/4, 16, 4] for int8, with 128 added; [N/16, K/8, 16, 4] for int4, inputs 0 to 3 of each eight in the
    low four bits. scales, zeros: [N/16, K/G, 16]. The rows that fill the last tile are zeros.
    """
    if packed.layout != "plain" or packed.scales is None or packed.format not in INTEGERS or packed.group % _BLOCK:
        return packed
    rows, columns = packed.shape
    missing = -rows % _TILE
    bytes_ = values.view(torch.uint8)
    if packed.format == "int8":
        fours = (bytes_ ^ 128).view(rows, columns // 4, 4)
    else:
        eights = split_nibbles(bytes_).view(rows, columns // 8, 2, 4)
        fours = eights[:, :, 0] | eights[:, :, 1] << 4
    zeros = packed.zeros
    if zeros is not None and packed.format == "int8":
        zeros = zeros.view(torch.uint8) ^ 128
    return replace(
        packed,
        values=_tiled(fours, missing),
        scales=_tiled(packed.scales, missing),
        zeros=None if zeros is None else _tiled(zeros, missing),
        layout=LAYOUT,
    )


def _tiled(rows: Tensor, missing: int) -> Tensor:
    """[N, C, …] → [N/16, C, 16, …], with zeros for what is missing."""
    filled = torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:])))
    return filled.unflatten(0, (-1, _TILE)).transpose(1, 2).contiguous()


def _restore(packed: PackedWeight) -> PackedWeight:
    rows, columns = packed.shape
    fours = _untiled(packed.values, rows)  # [N, K/4 or K/8, 4]
    zeros = None if packed.zeros is None else _untiled(packed.zeros, rows)
    assert packed.scales is not None
    if packed.format == "int8":
        values = (fours ^ 128).view(torch.int8).view(rows, columns)
        zeros = None if zeros is None else (zeros ^ 128).view(torch.int8)
    else:
        values = join_nibbles(torch.stack((fours & 15, fours >> 4), dim=-2).view(rows, columns))
    return replace(packed, values=values, scales=_untiled(packed.scales, rows), zeros=zeros, layout="plain")


RESTORED[LAYOUT] = _restore


def _untiled(tiles: Tensor, rows: int) -> Tensor:
    """[N/16, C, 16, …] → [N, C, …], without what filled the last tile."""
    return tiles.transpose(1, 2).flatten(0, 1)[:rows].contiguous()


def _refuses(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, int8_activations: bool = False) -> str | None:
    if not (x.is_cpu and packed.values.is_cpu and (bias is None or bias.is_cpu)):
        return f"takes CPU tensors; x is on {x.device}, the weight on {packed.values.device}"
    if not x.is_floating_point():
        return f"takes x in a floating-point dtype, not {x.dtype}"
    if packed.layout not in ("plain", LAYOUT):
        return f'the weight has the layout "{packed.layout}", not "plain" or "{LAYOUT}"'
    if int8_activations and (packed.layout == "plain" or x.dtype == torch.float64):
        return (
            "with 8-bit activations takes a prepared weight and x in 32 bits or fewer, not the layout"
            f' "{packed.layout}" with {x.dtype}'
        )
    return None


@_dispatch.register("packed_linear", "cpu", refuses=_refuses)
def packed_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None = None, int8_activations: bool = False
) -> Tensor:
    """Raises ValueError where x or bias does not fit the weight."""
    outputs, inputs = packed.shape
    if x.ndim == 0 or x.shape[-1] != inputs:
        raise ValueError(f"packed_linear: x has shape {tuple(x.shape)}, and the weight takes [..., {inputs}]")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"packed_linear: bias has shape {tuple(bias.shape)}, and the weight takes [{outputs}]")
    return cpu_packed_linear(
        x, packed.values, packed.scales, packed.zeros, bias, packed.format, packed.layout, outputs, packed.group,
        int8_activations,
    )  # fmt: skip


@define(
    lambda x, values, scales, zeros, bias, format, layout, outputs, *_: x.new_empty(*x.shape[:-1], outputs),
    devices=("CPU",),
)
def cpu_packed_linear(
    x: Tensor,
    values: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    format: str,
    layout: str,
    outputs: int,
    group: int,
    int8_activations: bool,
) -> Tensor:
    inputs = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    no_kernel = x.dtype == torch.float64 or (format != "bf16" and layout == "plain")
    most = most_rows(format, x.dtype, inputs)
    if no_kernel or (rows > most and not int8_activations):
        packed = PackedWeight(format, (outputs, inputs), values, scales, zeros, group, layout)  # type: ignore[arg-type]
        return _many_rows(x, packed, bias)
    weight = (values, scales, zeros, bias, format, layout, outputs, group, int8_activations)
    if x.dtype not in DTYPES:  # fp16
        return cpu_packed_linear(x.float(), *weight).to(x.dtype)
    x = x.contiguous()
    if int8_activations and rows > most and rows > _ROUNDED_AT_ONCE:
        parts = [cpu_packed_linear(some, *weight) for some in x.view(rows, inputs).split(_ROUNDED_AT_ONCE)]
        return torch.cat(parts).view(*x.shape[:-1], outputs)
    if bias is not None:
        bias = (bias if bias.dtype in DTYPES else bias.float()).contiguous()
    out = x.new_empty(*x.shape[:-1], outputs)
    x_in_c, size = (x.data_ptr(), DTYPES[x.dtype]), (rows, inputs)
    rest = (pointer(bias), 0 if bias is None else DTYPES[bias.dtype], outputs, out.data_ptr(), torch.get_num_threads())
    if format == "bf16":
        failed = functions().bf16_linear(*x_in_c, *size, values.data_ptr(), *rest)
    else:
        where = (values.data_ptr(), pointer(scales), pointer(zeros), format == "int4", group)
        failed = functions().packed_linear(*x_in_c, int8_activations, *size, *where, *rest)
    if failed:
        raise MemoryError("packed_linear: no memory for the rows of x in order")
    return out


def _many_rows(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    # However few the rows are: unpacking a block into fp32 costs no more than into a dtype that is slower.
    widens = x.dtype in (torch.bfloat16, torch.float16) and not cpu_gains_by(x.dtype)
    dtype = torch.float32 if widens else x.dtype
    if packed.values.dtype in (dtype, x.dtype):
        return linear(x, packed.values, None if bias is None else bias.to(x.dtype))
    return linear_in_blocks(x, packed.shape[0], functools.partial(_unpacked, packed), bias, dtype)


def _unpacked(packed: PackedWeight, first: int, end: int, room: Tensor) -> Tensor:
    """Outputs [first, end) as values in room's dtype, and in `room` where it can be; `first` is a multiple of 16."""
    if packed.layout == "plain":
        values = packed.values[first:end]
        if packed.scales is not None:
            zeros = None if packed.zeros is None else packed.zeros[first:end]
            shape, scales = (end - first, packed.shape[1]), packed.scales[first:end]
            values = unpack_weight(replace(packed, shape=shape, values=values, scales=scales, zeros=zeros))
        return room[: end - first].copy_(values)
    unpacked = room if room.dtype in DTYPES else torch.empty_like(room, dtype=torch.float32)
    weight = (packed.values.data_ptr(), pointer(packed.scales), pointer(packed.zeros), packed.format == "int4")
    where = (packed.shape[1], first // _TILE, -(-end // _TILE), DTYPES[unpacked.dtype], unpacked.data_ptr())
    functions().unpack_tiles(*weight, packed.group, *where, torch.get_num_threads())
    return unpacked[: end - first].to(room.dtype)
