"""`ops.packed_linear` of int8 and int4 weights by csrc/packed_linear.cu, in the plain layout.

More rows than the kernel takes are left to the reference: unpacking once and the tensor cores are faster for them, and
both read the same layout. Groups of a multiple of 32 (int4) or 16 (int8) are fast; any others work, a value at a time.

Shapes: T rows of x · N outputs · K inputs · G values of a group
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._dispatch import register
from ...packed_linear import INTEGERS, PackedWeight
from ..operators import define, more_rows_than, multiprocessors
from .library import DTYPES, INT, INT64, POINTER, Launcher, refused

_MOST_ROWS = 8
_ALIGNED = 16  # bytes that a row of x must begin at a multiple of, to be read in vectors

_launch = Launcher("packed_linear", *[POINTER] * 6, *[INT64] * 6, INT, INT)


def _refuses(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, int8_activations: bool = False) -> str | None:
    if int8_activations:
        return "takes activations as they are, not rounded to 8 bits"
    if packed.format not in INTEGERS or packed.layout != "plain" or packed.scales is None:
        return f'packed has format "{packed.format}" in layout "{packed.layout}"; takes int8 and int4 in the plain one'
    outputs, inputs = packed.shape
    if x.ndim == 0 or x.shape[-1] != inputs:
        return f"x has shape {list(x.shape)}; takes [..., K], here [..., {inputs}]"
    if packed.values.device != x.device:
        return f"packed is on {packed.values.device}, x on {x.device}; takes one device"
    if bias is not None and bias.shape != (outputs,):
        return f"bias has shape {list(bias.shape)}; takes [N], here [{outputs}]"
    return refused(x=x, bias=bias)


def _rows(x: Tensor) -> Tensor:
    """x as [T, K] with neighbours along K; a view where the kernel can read it in vectors."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) == 1 and not (rows.data_ptr() | rows.stride(0) * rows.itemsize) % _ALIGNED:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def _empty(x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


@define(_empty)
def cuda_packed_linear(
    x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    out = _empty(x, values, scales, zeros, bias, group)
    if out.numel():
        rows, values, scales = _rows(x), values.contiguous(), scales.contiguous()
        zeros = None if zeros is None else zeros.contiguous()
        bias = None if bias is None else bias.contiguous()
        _launch(
            x.device, rows.data_ptr(), values.data_ptr(), scales.data_ptr(),
            None if zeros is None else zeros.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
            rows.shape[0], rows.stride(0), values.shape[0], rows.shape[1], group, multiprocessors(x.device),
            4 if values.dtype == torch.uint8 else 8, DTYPES[x.dtype],
        )  # fmt: skip
    return out


@register("packed_linear", "cuda", refuses=_refuses, leaves=more_rows_than(_MOST_ROWS))
def packed_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None = None, int8_activations: bool = False
) -> Tensor:
    assert packed.scales is not None
    return cuda_packed_linear(x, packed.values, packed.scales, packed.zeros, bias, packed.group)
