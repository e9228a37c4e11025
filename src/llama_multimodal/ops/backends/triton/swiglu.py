"""SwiGLU's gate: one pass forward, one backward, for two tensors or one packed.

Shapes: R rows · F columns
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..._dispatch import register
from ..operators import define, differentiate
from .library import WIDE, as_rows, empty_rows, launch, order, refused, tile

_MOST = 2048  # columns of a block


@triton.jit
def _piece(rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The program's rows [ROWS, 1] and columns [1, BLOCK], and which of them there are."""
    across = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < columns)
    return row, column, mask


@triton.jit(do_not_specialize=["rows"])
def _forward(
    gate_ptr,
    up_ptr,
    out_ptr,
    rows,
    columns,
    gate_stride,
    up_stride,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, mask = _piece(rows, columns, ROWS, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(WIDE)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(WIDE)
    out = gate / (1 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * columns + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    grad_ptr,
    gate_ptr,
    up_ptr,
    gate_grad_ptr,
    up_grad_ptr,
    rows,
    columns,
    grad_stride,
    gate_stride,
    up_stride,
    out_stride,  # of both gradients
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, mask = _piece(rows, columns, ROWS, BLOCK)
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=mask, other=0.0).to(WIDE)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(WIDE)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(WIDE)
    share = 1 / (1 + tl.exp(-gate))
    gate_grad = grad * up * share * (1 + gate * (1 - share))  # silu' = σ (1 + x (1 - σ))
    up_grad = grad * gate * share
    at = row * out_stride + column
    tl.store(gate_grad_ptr + at, gate_grad.to(gate_grad_ptr.dtype.element_ty), mask=mask)
    tl.store(up_grad_ptr + at, up_grad.to(up_grad_ptr.dtype.element_ty), mask=mask)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    columns = gate.shape[-1] // 2
    return gate[..., :columns], gate[..., columns:]


def _rows(*tensors: Tensor) -> tuple[list[Tensor], list[int]]:
    """Tensors of one shape as rows; dense ones as a single row, which no small last axis cuts up."""
    axes = order(tensors[0])
    if all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors], axes
    return [as_rows(x, axes) for x in tensors], axes


def _empty_out(gate: Tensor, up: Tensor | None) -> Tensor:
    gate, _ = _halves(gate, up)
    return empty_rows(gate, order(gate))


@define(_empty_out)
def triton_swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    out = _empty_out(gate, up)
    (gate_rows, up_rows), _ = _rows(*_halves(gate, up))
    rows, columns = gate_rows.shape
    height, width, warps = tile(rows, columns, 2048, _MOST)
    launch(
        _forward,
        triton.cdiv(rows, height) * triton.cdiv(columns, width),
        gate_rows,
        up_rows,
        out,
        rows,
        columns,
        gate_rows.stride(0),
        up_rows.stride(0),
        WIDE=WIDE[gate.dtype],
        ROWS=height,
        BLOCK=width,
        warps=warps,
    )
    return out


def _empty_gradients(grad: Tensor, gate: Tensor, up: Tensor | None) -> list[Tensor]:
    count = 1 if up is None else 2
    return [empty_rows(gate, order(gate)) for _ in range(count)]


@define(_empty_gradients)
def triton_swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> list[Tensor]:
    """The gradients of gate and up, or of the packed tensor."""
    outputs = _empty_gradients(grad, gate, up)
    (gate_rows, up_rows, grad_rows), axes = _rows(*_halves(gate, up), grad)
    rows, columns = gate_rows.shape
    if up is None:
        gate_grad, up_grad = (as_rows(half, axes) for half in _halves(outputs[0], None))
    else:
        gate_grad, up_grad = outputs
    height, width, warps = tile(rows, columns, 2048, _MOST)
    launch(
        _backward,
        triton.cdiv(rows, height) * triton.cdiv(columns, width),
        grad_rows,
        gate_rows,
        up_rows,
        gate_grad,
        up_grad,
        rows,
        columns,
        grad_rows.stride(0),
        gate_rows.stride(0),
        up_rows.stride(0),
        columns if up is not None else 2 * columns,
        WIDE=WIDE[gate.dtype],
        ROWS=height,
        BLOCK=width,
        warps=warps,
    )
    return outputs


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    gate, up = ctx.saved_tensors
    gradients = triton_swiglu_backward(grad, gate, up)
    return gradients[0], None if up is None else gradients[1]


differentiate(triton_swiglu, _gradients, _setup)


def _refuses(gate: Tensor, up: Tensor | None = None) -> str | None:
    if gate.ndim == 0 or (up is None and gate.shape[-1] % 2):
        return f"gate has shape {tuple(gate.shape)}; takes [..., F] with up, or [..., 2F]"
    if up is not None and up.shape != gate.shape:
        return f"up has shape {tuple(up.shape)}; takes that of gate, {tuple(gate.shape)}"
    return refused(gate=gate, up=up)


@register("swiglu", "triton", refuses=_refuses, differentiable=True)
def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    return triton_swiglu(gate, up)
