"""`ops.rms_norm` and `ops.add_rms_norm` by csrc/rms_norm.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._dispatch import register
from ..operators import define, differentiate, multiprocessors
from .library import DTYPES, FLOAT, INT, INT64, POINTER, Launcher, as_rows, empty_like, refused

_launch = Launcher("rms_norm", *[POINTER] * 5, *[INT64] * 10, FLOAT, INT)
_launch_backward = Launcher("rms_norm_backward", *[POINTER] * 7, *[INT64] * 14, FLOAT, INT)


def _refuses(x: Tensor, weight: Tensor, eps: float) -> str | None:
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        return f"weight has shape {list(weight.shape)}, x {list(x.shape)}; takes one value for each column of x"
    return refused(x=x, weight=weight)


def _refuses_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> str | None:
    if residual.shape != x.shape:
        return f"residual has shape {list(residual.shape)}, x {list(x.shape)}; takes one shape"
    return _refuses(x, weight, eps) or refused(x=x, residual=residual)


def _run(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, summed: Tensor | None) -> None:
    if not x.numel():
        return
    tensors, n, steps = as_rows(x) if residual is None else as_rows(x, residual)
    weight = weight.contiguous()
    _launch(
        x.device, tensors[0].data_ptr(), None if residual is None else tensors[1].data_ptr(),
        weight.data_ptr(), out.data_ptr(), None if summed is None else summed.data_ptr(), *n,
        x.shape[-1], *steps[0], *(steps[1] if residual is not None else (0, 0, 0)), eps, DTYPES[x.dtype],
    )  # fmt: skip


# --- the ops ---------------------------------------------------------------------------------------------------------


@define(lambda x, *_: empty_like(x))
def cuda_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = empty_like(x)
    _run(x, None, weight, eps, out, None)
    return out


@define(lambda x, *_: (empty_like(x), empty_like(x)))
def cuda_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, summed = empty_like(x), empty_like(x)
    _run(x, residual, weight, eps, out, summed)
    return out, summed


@define(lambda grad, grad_sum, x, weight, eps: (empty_like(x), empty_like(weight)))
def cuda_rms_norm_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight; grad_sum, a gradient that reached x elsewhere, is added to x's."""
    grad_x = empty_like(x)
    if not x.numel():
        return grad_x, torch.zeros_like(weight)
    tensors, n, steps = as_rows(grad, x) if grad_sum is None else as_rows(grad, x, grad_sum)
    size = x.shape[-1]
    grad_weight, weight = empty_like(weight), weight.contiguous()
    # A block takes many rows, so that few sums are left for the weight; short rows need more blocks to fill a device.
    count = min(x.numel() // size, multiprocessors(x.device) * max(1, min(4, 8192 // size)))
    parts = x.new_empty((count, size), dtype=torch.float32)
    _launch_backward(
        x.device, tensors[0].data_ptr(), None if grad_sum is None else tensors[2].data_ptr(), tensors[1].data_ptr(),
        weight.data_ptr(), grad_x.data_ptr(), grad_weight.data_ptr(), parts.data_ptr(), count, *n, size, *steps[0],
        *(steps[2] if grad_sum is not None else (0, 0, 0)), *steps[1], eps, DTYPES[x.dtype],
    )  # fmt: skip
    return grad_x, grad_weight


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.set_materialize_grads(False)  # no zeros for an output that nobody used
    ctx.save_for_backward(output[1], weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    grad_x, grad_weight = cuda_rms_norm_backward(grad, None, *ctx.saved_tensors, ctx.eps)
    return grad_x, grad_weight, None


def _add_backward(
    ctx: Any, grad: Tensor | None, grad_sum: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    if grad is None:
        return grad_sum, grad_sum, None, None
    grad_x, grad_weight = cuda_rms_norm_backward(grad, grad_sum, *ctx.saved_tensors, ctx.eps)
    return grad_x, grad_x, grad_weight, None


differentiate(cuda_rms_norm, _backward, _keep)
differentiate(cuda_add_rms_norm, _add_backward, _keep_sum)


@register("rms_norm", "cuda", refuses=_refuses, differentiable=True)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return cuda_rms_norm(x, weight, eps)


@register("add_rms_norm", "cuda", refuses=_refuses_add, differentiable=True)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return cuda_add_rms_norm(x, residual, weight, eps)
