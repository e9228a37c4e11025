"""`packed_linear` on CPUs: few rows read the weight once; many rows take it block by block through torch's product.

Shapes: N outputs · K inputs · G values of a group · T rows of x

bf16 weights stay as they lie, [N, K], and their products are fp32 sums of exact values. int8 and int4 weights lie in
tiles of 16 outputs, so that a lane of a vector is an output, and meet x in whole numbers: each row of x is rounded, by
blocks of 32 inputs, to 14 bits (bf16) or 23 (fp32, fp16) below the block's largest value, so bf16 values down to 1/64
of that one stay exact. Nothing is lost to 8-bit activations. Measured over normal values, K from 64 to 8192, relative
to |x| and the weight's root mean square, the sums are off by at most 3e-5 (bf16, whose rounding of the results makes
1.6e-3 on average) and 2e-6 (fp32, where torch's own products are off by as much). Every instruction set sums the same
whole numbers. A row that holds inf or NaN gives NaN.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _dispatch
from ...linear import linear, widens
from ...packed_linear import PackedWeight, unpack_weight
from ..operators import define
from .library import DTYPES, functions, instruction_set, pointer

LAYOUT = "cpu tiles"
_TILE, _BLOCK = 16, 32  # outputs that lie interleaved, inputs that are rounded together
# Rows up to which a kernel is faster than torch's product, on the instruction set's kind of machine.
_FEW_BF16 = {"avx512": 4, "avx2": 8, "plain": 2}
_FEW_INTEGER = {"avx512": 96, "avx2": 24, "plain": 2}
_BLOCK_VALUES = 1 << 20  # of a weight that is unpacked for many rows: it stays in the cache until it is multiplied


@_dispatch.register("prepare_weight", "cpu")
def prepare_weight(values: Tensor, packed: PackedWeight) -> PackedWeight:
    """int8 and int4 in groups of a multiple of 32 are laid out in tiles; anything else stays as it is.

    values: [N/16, K/4, 16, 4] for int8, with 128 added; [N/16, K/8, 16, 4] for int4, inputs 0 to 3 of each eight in the
    low four bits. scales, zeros: [N/16, K/G, 16]. The rows that fill the last tile are zeros.
    """
    if packed.layout != "plain" or packed.scales is None or packed.group % _BLOCK:
        return packed
    rows, columns = packed.shape
    missing = -rows % _TILE
    bytes_ = values.view(torch.uint8)
    if packed.format == "int8":
        fours = (bytes_ ^ 128).view(rows, columns // 4, 4)
    else:
        eights = torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1).view(rows, columns // 8, 2, 4)
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


def _refuses(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> str | None:
    if not (x.is_cpu and packed.values.is_cpu and (bias is None or bias.is_cpu)):
        return f"takes CPU tensors; x is on {x.device}, the weight on {packed.values.device}"
    if not x.is_floating_point():
        return f"takes x in a floating-point dtype, not {x.dtype}"
    if packed.layout not in ("plain", LAYOUT):
        return f'the weight has the layout "{packed.layout}", not "plain" or "{LAYOUT}"'
    return None


@_dispatch.register("packed_linear", "cpu", refuses=_refuses)
def packed_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Raises ValueError where x or bias does not fit the weight."""
    outputs, inputs = packed.shape
    if x.ndim == 0 or x.shape[-1] != inputs:
        raise ValueError(f"packed_linear: x has shape {tuple(x.shape)}, and the weight takes [..., {inputs}]")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"packed_linear: bias has shape {tuple(bias.shape)}, and the weight takes [{outputs}]")
    return cpu_packed_linear(
        x, packed.values, packed.scales, packed.zeros, bias, packed.format, packed.layout, outputs, packed.group
    )


@define(
    lambda x, values, scales, zeros, bias, format, layout, outputs, group: x.new_empty(*x.shape[:-1], outputs),
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
) -> Tensor:
    inputs = x.shape[-1]
    out = x.new_empty(*x.shape[:-1], outputs)
    rows = out.numel() // max(1, outputs)
    no_kernel = x.dtype == torch.float64 or (format != "bf16" and layout == "plain")
    few = (_FEW_BF16 if format == "bf16" else _FEW_INTEGER)[instruction_set()]
    if no_kernel or rows > few:
        packed = PackedWeight(format, (outputs, inputs), values, scales, zeros, group, layout)  # type: ignore[arg-type]
        _many_rows(x.reshape(rows, inputs), packed, bias, out.view(rows, outputs))
        return out
    if x.dtype not in DTYPES:  # fp16
        return cpu_packed_linear(x.float(), values, scales, zeros, bias, format, layout, outputs, group).to(x.dtype)
    x = x.contiguous()
    if bias is not None:
        bias = (bias if bias.dtype in DTYPES else bias.float()).contiguous()
    x_in_c = (x.data_ptr(), DTYPES[x.dtype], rows, inputs)
    rest = (pointer(bias), 0 if bias is None else DTYPES[bias.dtype], outputs, out.data_ptr(), torch.get_num_threads())
    if format == "bf16":
        failed = functions().bf16_linear(*x_in_c, values.data_ptr(), *rest)
    else:
        weight = (values.data_ptr(), pointer(scales), pointer(zeros), format == "int4", group)
        failed = functions().packed_linear(*x_in_c, *weight, *rest)
    if failed:
        raise MemoryError("packed_linear: no memory for the rounded rows of x")
    return out


def _many_rows(x: Tensor, packed: PackedWeight, bias: Tensor | None, out: Tensor) -> None:
    """x: [T, K], out: [T, N]"""
    outputs, inputs = packed.shape
    if packed.format == "bf16" and x.dtype == torch.bfloat16:
        out.copy_(linear(x, packed.values, None if bias is None else bias.to(x.dtype)))
        return
    dtype = torch.float32 if widens(x) else x.dtype
    x = x.to(dtype)
    step = max(_TILE, _BLOCK_VALUES // max(1, inputs) // _TILE * _TILE)
    room = x.new_empty(min(step, outputs + -outputs % _TILE), inputs, dtype=dtype if dtype in DTYPES else torch.float32)
    for first in range(0, outputs, step):
        end = min(first + step, outputs)
        block = _unpacked(packed, first, end, room).to(dtype)  # [end - first, K]
        out[:, first:end] = F.linear(x, block, None if bias is None else bias[first:end].to(dtype))


def _unpacked(packed: PackedWeight, first: int, end: int, room: Tensor) -> Tensor:
    """Outputs [first, end) as values, in `room` where a kernel unpacks them; `first` is a multiple of 16."""
    inputs = packed.shape[1]
    if packed.layout == "plain":
        part = {
            name: tensor[first:end]
            for name in ("values", "scales", "zeros")
            if (tensor := getattr(packed, name)) is not None
        }
        return unpack_weight(replace(packed, shape=(end - first, inputs), **part))
    weight = (packed.values.data_ptr(), pointer(packed.scales), pointer(packed.zeros), packed.format == "int4")
    where = (inputs, first // _TILE, -(-end // _TILE), DTYPES[room.dtype], room.data_ptr())
    functions().unpack_tiles(*weight, packed.group, *where, torch.get_num_threads())
    return room[: end - first]
