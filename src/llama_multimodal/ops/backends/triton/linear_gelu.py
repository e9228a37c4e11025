"""Bias and GELU in one pass over the product that torch's own library computes.

Shapes: R rows · K inputs · N outputs
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..._dispatch import register
from ...linear import linear
from ..operators import define, differentiate
from .library import WIDE, launch, refused, tile


@triton.jit(do_not_specialize=["rows"])
def _bias_gelu(
    x_ptr,  # in and out
    bias_ptr,  # x_ptr again where BIAS is off
    rows,
    columns,
    WIDE: tl.constexpr,
    BIAS: tl.constexpr,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    across = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < columns)
    at = row * columns + column
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(WIDE)
    if BIAS:
        x += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(WIDE)
    if TANH:  # (1 + tanh u) / 2 = σ(2u), and 2 √(2/π) = 1.5957691216057308
        x = x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:  # 1 / √2 = 0.7071067811865476
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=mask)


def _empty(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@define(_empty)
def triton_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    out = linear(x, weight).contiguous()
    columns = weight.shape[0]
    rows = out.numel() // max(1, columns)
    height, width, warps = tile(rows, columns, 2048, 2048)
    launch(
        _bias_gelu,
        triton.cdiv(rows, height) * triton.cdiv(columns, width),
        out,
        out if bias is None else bias.contiguous(),
        rows,
        columns,
        WIDE=WIDE[x.dtype],
        BIAS=bias is not None,
        TANH=approximate == "tanh",
        ROWS=height,
        BLOCK=width,
        warps=warps,
    )
    return out


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, weight, bias)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """By torch: the product once more, instead of keeping what the activation read."""
    x, weight, bias = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
    before = torch.ops.aten.gelu_backward(grad, linear(x, weight, bias), approximate=ctx.approximate)
    rows = before.flatten(0, -2)
    return (
        F.linear(before, weight.t()) if for_x else None,
        rows.t() @ x.flatten(0, -2) if for_weight else None,
        rows.sum(0) if for_bias else None,
        None,
    )


differentiate(triton_linear_gelu, _gradients, _setup)


def _refuses(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str = "none") -> str | None:
    if approximate not in ("none", "tanh"):
        return f'approximate is "{approximate}"; takes "none" or "tanh"'
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        return f"weight has shape {tuple(weight.shape)}; takes [N, K], K the last axis of x {tuple(x.shape)}"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"bias has shape {tuple(bias.shape)}; takes [N] = [{weight.shape[0]}]"
    return refused(x=x, weight=weight, bias=bias)


@register("linear_gelu", "triton", refuses=_refuses, differentiable=True)
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    return triton_linear_gelu(x, weight, bias, approximate)
