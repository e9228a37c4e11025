"""RMSNorm, alone and behind a residual addition, and its backward pass.

A program takes a block of rows. Rows that fit into its registers are read once; longer ones twice.

Shapes: R rows · D columns · P programs
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._dispatch import register
from ..operators import define, differentiate, multiprocessors
from .library import WIDE, as_rows, empty_rows, launch, order, refused, tile

_MOST = 8192  # columns of a block
_MOST_BACKWARD = 8192  # a row and its gradients must stay in registers


@triton.jit
def _read(x_ptr, residual_ptr, x_at, residual_at, mask, WIDE: tl.constexpr, ADD: tl.constexpr):
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0)
    if ADD:  # rounded as the stored sum is
        x = (tl.load(residual_ptr + residual_at, mask=mask, other=0.0).to(WIDE) + x.to(WIDE)).to(x.dtype)
    return x


@triton.jit
def _write(out_ptr, sum_ptr, weight_ptr, x, rstd, column, at, mask, WIDE: tl.constexpr, ADD: tl.constexpr):
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(WIDE)
    normed = (x.to(WIDE) * rstd[:, None]).to(x.dtype)  # rounded before the weight, as the op's contract says
    tl.store(out_ptr + at, (normed.to(WIDE) * weight).to(x.dtype), mask=mask)
    if ADD:
        tl.store(sum_ptr + at, x, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x_ptr,
    residual_ptr,  # x_ptr again where ADD is off
    weight_ptr,
    out_ptr,
    sum_ptr,  # out_ptr again where ADD is off
    rows,
    columns,
    x_stride,
    residual_stride,
    eps,
    WIDE: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # a row is one block
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    x_at, residual_at, out_at = row * x_stride, row * residual_stride, row * columns
    if WHOLE:
        mask = (row < rows) & (column < columns)
        x = _read(x_ptr, residual_ptr, x_at + column, residual_at + column, mask, WIDE, ADD)
        wide = x.to(WIDE)
        rstd = tl.rsqrt(tl.sum(wide * wide, 1) / columns + eps)
        _write(out_ptr, sum_ptr, weight_ptr, x, rstd, column, out_at + column, mask, WIDE, ADD)
    else:
        squares = tl.zeros([ROWS, BLOCK], WIDE)
        for first in range(0, columns, BLOCK):
            at = first + column
            mask = (row < rows) & (at < columns)
            wide = _read(x_ptr, residual_ptr, x_at + at, residual_at + at, mask, WIDE, ADD).to(WIDE)
            squares += wide * wide
        rstd = tl.rsqrt(tl.sum(squares, 1) / columns + eps)
        for first in range(0, columns, BLOCK):
            at = first + column
            mask = (row < rows) & (at < columns)
            x = _read(x_ptr, residual_ptr, x_at + at, residual_at + at, mask, WIDE, ADD)
            _write(out_ptr, sum_ptr, weight_ptr, x, rstd, at, out_at + at, mask, WIDE, ADD)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    grad_ptr,  # of the norm
    sum_grad_ptr,  # of the sum, where SUM is on
    x_ptr,
    weight_ptr,
    x_grad_ptr,
    weight_grad_ptr,  # [P, D], a program's share each
    rows,
    columns,
    grad_stride,
    sum_grad_stride,
    x_stride,
    eps,
    WIDE: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(WIDE)[None, :]
    weight_grad = tl.zeros([BLOCK], WIDE)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        mask = (row < rows) & (column[None, :] < columns)
        stored = tl.load(x_ptr + row * x_stride + column[None, :], mask=mask, other=0.0)
        grad = tl.load(grad_ptr + row * grad_stride + column[None, :], mask=mask, other=0.0).to(WIDE)
        x = stored.to(WIDE)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / columns + eps)[:, None]
        normed = x * rstd
        weight_grad += tl.sum(grad * normed.to(stored.dtype).to(WIDE), 0)
        grad *= weight
        x_grad = rstd * (grad - normed * (tl.sum(grad * normed, 1) / columns)[:, None])
        if SUM:
            x_grad += tl.load(sum_grad_ptr + row * sum_grad_stride + column[None, :], mask=mask, other=0.0).to(WIDE)
        tl.store(x_grad_ptr + row * columns + column[None, :], x_grad.to(stored.dtype), mask=mask)
    at = tl.program_id(0).to(tl.int64) * columns + column
    tl.store(weight_grad_ptr + at, weight_grad, mask=column < columns)


def _run(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    axes = order(x)
    x_rows = as_rows(x, axes)
    residual_rows = x_rows if residual is None else as_rows(residual, axes)
    out = empty_rows(x, axes)
    summed = None if residual is None else empty_rows(x, axes)
    rows, columns = x_rows.shape
    height, width, warps = tile(rows, columns, 2048, _MOST)
    launch(
        _forward,
        triton.cdiv(rows, height),
        x_rows,
        residual_rows,
        weight.contiguous(),
        out,
        out if summed is None else summed,
        rows,
        columns,
        x_rows.stride(0),
        residual_rows.stride(0),
        eps,
        WIDE=WIDE[x.dtype],
        ADD=residual is not None,
        ROWS=height,
        BLOCK=width,
        WHOLE=width >= columns,
        warps=warps,
    )
    return out, summed


@define(lambda x, weight, eps: empty_rows(x, order(x)))
def triton_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _run(x, None, weight, eps)[0]


@define(lambda x, residual, weight, eps: (empty_rows(x, order(x)), empty_rows(x, order(x))))
def triton_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, summed = _run(x, residual, weight, eps)
    assert summed is not None
    return out, summed


@define(lambda grad, sum_grad, x, weight, eps: (empty_rows(x, order(x)), torch.empty_like(weight)))
def triton_rms_norm_backward(
    grad: Tensor, sum_grad: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; `sum_grad` is added to that of x: what else was made of x than its norm."""
    axes = order(x)
    x_rows, grad_rows = as_rows(x, axes), as_rows(grad, axes)
    sum_grad_rows = grad_rows if sum_grad is None else as_rows(sum_grad, axes)
    x_grad = empty_rows(x, axes)
    rows, columns = x_rows.shape
    height, width, warps = tile(rows, columns, 2048, _MOST_BACKWARD)
    programs = min(triton.cdiv(rows, height), 2 * multiprocessors(x.device))
    shares = x.new_empty(programs, columns, dtype=torch.promote_types(x.dtype, torch.float32))
    launch(
        _backward,
        programs,
        grad_rows,
        sum_grad_rows,
        x_rows,
        weight.contiguous(),
        x_grad,
        shares,
        rows,
        columns,
        grad_rows.stride(0),
        sum_grad_rows.stride(0),
        x_rows.stride(0),
        eps,
        WIDE=WIDE[x.dtype],
        SUM=sum_grad is not None,
        ROWS=height,
        BLOCK=width,
        warps=warps,
    )
    return x_grad, shares.sum(0).to(weight.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    x_grad, weight_grad = triton_rms_norm_backward(grad, None, x, weight, ctx.eps)
    return x_grad, weight_grad, None


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _gradients_add(ctx: Any, grad: Tensor, sum_grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    summed, weight = ctx.saved_tensors
    x_grad, weight_grad = triton_rms_norm_backward(grad, sum_grad, summed, weight, ctx.eps)
    return x_grad, x_grad, weight_grad, None


differentiate(triton_rms_norm, _gradients, _setup)
differentiate(triton_add_rms_norm, _gradients_add, _setup_add)


def _refuses(x: Tensor, weight: Tensor, eps: float) -> str | None:
    if why := refused(x=x, weight=weight):
        return why
    columns = x.shape[-1] if x.ndim else 0
    if weight.shape != (columns,) or columns == 0:
        return f"weight has shape {tuple(weight.shape)}; takes [D], the last axis of x {tuple(x.shape)}"
    if columns > _MOST_BACKWARD and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return f"x has {columns} columns; the backward pass takes {_MOST_BACKWARD} at most"
    return None


def _refuses_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> str | None:
    if residual.shape != x.shape:
        return f"residual has shape {tuple(residual.shape)}; takes that of x, {tuple(x.shape)}"
    return refused(x=x, residual=residual) or _refuses(residual if residual.requires_grad else x, weight, eps)


register("rms_norm", "triton", refuses=_refuses, differentiable=True)(triton_rms_norm)
register("add_rms_norm", "triton", refuses=_refuses_add, differentiable=True)(triton_add_rms_norm)
