"""Matrix products of activations and weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _dispatch

# From this many rows on, widening a weight once costs less than multiplying in an emulated half precision.
_MIN_ROWS_TO_WIDEN = 16
_ROWS_AT_ONCE = 512  # that are widened together: their fp32 copies stay small and in the cache
_VALUES_AT_ONCE = 1 << 21  # of a weight in another form than it lies in: still in the cache when they are multiplied
_BLOCKS_BEGIN_AT = 16  # multiples of this


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x · weightᵀ + bias`; x: [..., K], weight: [N, K], bias: [N] → [..., N] in x's dtype."""
    return _dispatch.call("linear", _torch, x, weight, bias)


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not widens(x):
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)):
        return _Widened.apply(x, weight, bias)
    return linear_in_blocks(
        x, weight.shape[0], lambda first, end, room: room[: end - first].copy_(weight[first:end]), bias, torch.float32
    )


class _Widened(torch.autograd.Function):
    """`linear` in fp32, rounded once, that keeps x and the weight for the backward pass as they are: their fp32 copies
    would take three times the memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_weight = ctx.needs_input_grad[1]
        ctx.save_for_backward(x if needs_weight else None, weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        wide = grad.float()
        rows = wide.flatten(0, -2)
        return (
            (wide @ weight.float()).to(grad.dtype) if for_x else None,
            (rows.t() @ x.flatten(0, -2).float()).to(weight.dtype) if for_weight else None,
            rows.sum(0).to(grad.dtype) if for_bias else None,
        )


def linear_in_blocks(
    x: Tensor, outputs: int, block: Callable[[int, int, Tensor], Tensor], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`linear` in `dtype`, with a weight that is brought into it block by block; rounded once to x's dtype.

    block: gives the weight's rows [first, end) in `dtype`, using a scratch tensor of at least that many rows; `first`
    is a multiple of 16, and the scratch has room for as many rows as go to the next one.
    """
    inputs = x.shape[-1]
    rows = x.reshape(-1, inputs)
    out = rows.new_empty(rows.shape[0], outputs)
    bias = None if bias is None else bias.to(dtype)
    step = max(1, _VALUES_AT_ONCE // max(1, inputs) // _BLOCKS_BEGIN_AT) * _BLOCKS_BEGIN_AT
    room = rows.new_empty(min(step, outputs + -outputs % _BLOCKS_BEGIN_AT), inputs, dtype=dtype)
    at_once = max(1, len(rows)) if dtype == x.dtype else _ROWS_AT_ONCE
    for some, place in zip(rows.split(at_once), out.split(at_once), strict=True):
        some = some.to(dtype)
        for first in range(0, outputs, step):
            end = min(first + step, outputs)
            place[:, first:end] = F.linear(some, block(first, end, room), None if bias is None else bias[first:end])
    return out.view(*x.shape[:-1], outputs)


def widens(x: Tensor) -> bool:
    """Whether a product with x runs in fp32 and is rounded once at the end.

    A CPU without bf16 or fp16 instructions emulates them at about a tenth of its fp32 rate, and some have bf16
    instructions that are slower than fp32's. Either way the sum is accumulated in fp32, so the result differs by the
    order of the sum only.
    """
    half = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    return half and x.numel() // max(1, x.shape[-1]) >= _MIN_ROWS_TO_WIDEN and not cpu_gains_by(x.dtype)


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix instructions for a half-precision dtype."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported() and _cpu_flag("avx512_bf16", "amx_bf16", "bf16")
    return torch.ops.mkldnn._is_mkldnn_fp16_supported() and _cpu_flag("avx512_fp16", "amx_fp16", "asimdhp")


@_dispatch.constant  # it reads a file
def cpu_gains_by(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a half-precision dtype faster than in fp32."""
    return cpu_multiplies(dtype) and not (dtype == torch.bfloat16 and _has_slow_pairs())


@functools.cache
def _has_slow_pairs() -> bool:
    """Whether products of bf16 pairs run at half the rate of fp32 products, as on Intel's (measured on Emerald Rapids).

    Its matrix unit is another matter, but a virtual machine may hide it.
    """
    return "GenuineIntel" in _cpu_line("vendor_id") and not has_matrix_unit()


@functools.cache
def has_matrix_unit() -> bool:
    """Whether this CPU has AMX, through which torch multiplies bf16."""
    return "amx_bf16" in _cpu_line("flags")


def _cpu_flag(*names: str) -> bool:
    flags = _cpu_line("flags", "features")
    return not flags or any(name in flags for name in names)  # not known, as outside Linux: trust torch's own choice


def _cpu_line(*names: str) -> list[str]:
    """The words of the first line of /proc/cpuinfo that begins with one of the names; none where there is no such."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split() for line in file if line.lower().startswith(names)), [])
    except OSError:
        return []
