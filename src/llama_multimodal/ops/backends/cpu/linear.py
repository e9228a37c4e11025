"""`linear` of bf16 on CPUs with a matrix unit, and on those that multiply bf16 slower than fp32, or not at all: there
weights are widened in the cache and meet all rows; torch would write an fp32 copy to memory first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import _dispatch
from ...linear import cpu_gains_by
from ..operators import define
from .library import DTYPES, functions, has_tile_linear, has_wide_linear, pointer
from .packed_linear import few_rows


def _leaves(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether torch's own is used: for nothing, for other dtypes, and where the CPU gains by bf16."""
    return (
        not (x.is_cpu and weight.is_cpu and (bias is None or bias.is_cpu))
        or not x.dtype == weight.dtype == torch.bfloat16
        or (bias is not None and bias.dtype not in DTYPES)
        or x.ndim == 0
        or not x.numel()
        or not weight.numel()
        or not (has_tile_linear(x.shape[-1]) or (has_wide_linear() and not cpu_gains_by(torch.bfloat16)))
    )


@_dispatch.register("linear", "cpu", leaves=_leaves)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Raises ValueError where x or bias does not fit the weight."""
    outputs, inputs = weight.shape
    if x.shape[-1] != inputs:
        raise ValueError(f"linear: x has shape {tuple(x.shape)}, and the weight takes [..., {inputs}]")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"linear: bias has shape {tuple(bias.shape)}, and the weight takes [{outputs}]")
    return cpu_linear(x, weight, bias)


@define(lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]), devices=("CPU",))
def cpu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows, bias_dtype = math.prod(x.shape[:-1]), 0 if bias is None else DTYPES[bias.dtype]
    weight_in_c = (weight.data_ptr(), pointer(bias), bias_dtype, weight.shape[0])
    rest = (rows, x.shape[-1], *weight_in_c, out.data_ptr(), torch.get_num_threads())
    if rows <= few_rows("bf16"):
        failed = functions().bf16_linear(x.data_ptr(), DTYPES[x.dtype], *rest)
    else:
        failed = functions().wide_linear(x.data_ptr(), *rest)
    if failed:
        raise MemoryError("linear: no memory for the rows of x in order")
    return out
