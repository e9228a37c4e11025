"""`ops.swiglu` by csrc/swiglu.cu.

Shapes: R rows · F columns of a half
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..._dispatch import register
from ..operators import define, differentiate
from .library import DTYPES, INT, INT64, POINTER, Launcher, empty_like, refused

_launch = Launcher("swiglu", *[POINTER] * 3, *[INT64] * 4, INT)
_launch_backward = Launcher("swiglu_backward", *[POINTER] * 5, *[INT64] * 6, INT)


def _refuses(gate: Tensor, up: Tensor | None = None) -> str | None:
    if up is None and (gate.ndim == 0 or gate.shape[-1] % 2):
        return f"gate has shape {list(gate.shape)}; without up it takes an even last axis, gate and up side by side"
    if up is not None and up.shape != gate.shape:
        return f"up has shape {list(up.shape)}, gate {list(gate.shape)}; takes one shape"
    return refused(gate=gate, up=up)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """gate and up as [R, F] with neighbours along F; a view where one step between rows describes the strides."""
    if up is None:
        packed = _rows(gate)
        columns = packed.shape[1] // 2
        return packed[:, :columns], packed[:, columns:]
    if gate.is_contiguous() and up.is_contiguous():
        return gate.view(1, -1), up.view(1, -1)
    return _rows(gate), _rows(up)


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


# --- the ops ---------------------------------------------------------------------------------------------------------


def _empty(gate: Tensor, up: Tensor | None) -> Tensor:
    return empty_like(gate if up is not None else gate[..., : gate.shape[-1] // 2])


@define(_empty)
def cuda_swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    out = _empty(gate, up)
    if out.numel():
        gates, ups = _halves(gate, up)
        _launch(
            gate.device, gates.data_ptr(), ups.data_ptr(), out.data_ptr(), *gates.shape, gates.stride(0),
            ups.stride(0), DTYPES[gate.dtype],
        )  # fmt: skip
    return out


def _empty_grads(grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    return empty_like(gate), gate.new_empty(0) if up is None else empty_like(up)


@define(_empty_grads)
def cuda_swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up; without up that of the packed gate, and nothing."""
    grads = _empty_grads(grad, gate, up)
    if not gate.numel():
        return grads
    gates, ups = _halves(gate, up)
    rows, columns = gates.shape
    grad_gate, grad_up = grads if up is not None else (grads[0], grads[0][..., columns:])
    grad = grad.contiguous()
    _launch_backward(
        gate.device, grad.data_ptr(), gates.data_ptr(), ups.data_ptr(), grad_gate.data_ptr(), grad_up.data_ptr(),
        rows, columns, columns, gates.stride(0), ups.stride(0), columns if up is not None else 2 * columns,
        DTYPES[gate.dtype],
    )  # fmt: skip
    return grads


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    gate, up = ctx.saved_tensors
    grad_gate, grad_up = cuda_swiglu_backward(grad, gate, up)
    return grad_gate, None if up is None else grad_up


differentiate(cuda_swiglu, _backward, _keep)


@register("swiglu", "cuda", refuses=_refuses, differentiable=True)
def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    return cuda_swiglu(gate, up)
