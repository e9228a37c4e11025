"""`rms_norm`, `add_rms_norm`, `swiglu` and `apply_rope` on CPUs: a row at a time and in one pass, where torch goes over
it once for each operation. Not inside `torch.compile`, which makes such passes of its own, and not where gradients are
recorded: a training step rounds alike in its frozen parts and the others, however processes share them.

Shapes: R rows · F columns · B batch · H query heads · Hkv key heads · T tokens · D head dim · P rows of the table
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _dispatch
from ..operators import define
from .library import DTYPES, dense_last, functions, pointer, strides


def _takes(*tensors: Tensor | None) -> bool:
    """Whether answers are computed, and tensors are on the CPU, of one dtype that kernels take, and hold something."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    there = [tensor for tensor in tensors if tensor is not None]
    dtype = there[0].dtype
    return dtype in DTYPES and all(x.is_cpu and x.dtype == dtype and x.ndim > 0 and x.numel() > 0 for x in there)


# --- rms_norm --------------------------------------------------------------------------------------------------------


def _leaves_norm(x: Tensor, weight: Tensor, eps: float) -> bool:
    return not _takes(x, weight) or weight.shape != x.shape[-1:]


def _leaves_add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> bool:
    return not _takes(x, residual, weight) or weight.shape != x.shape[-1:] or residual.shape != x.shape


@_dispatch.register("rms_norm", "cpu", leaves=_leaves_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return cpu_rms_norm(x, weight, eps)


@_dispatch.register("add_rms_norm", "cpu", leaves=_leaves_add_norm)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return cpu_add_rms_norm(x, residual, weight, eps)


@define(lambda x, *_: x.new_empty(x.shape), devices=("CPU",))
def cpu_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = x.new_empty(x.shape)
    _normalize(x, None, weight, eps, out, None)
    return out


@define(lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)), devices=("CPU",))
def cpu_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, summed = x.new_empty(x.shape), x.new_empty(x.shape)
    _normalize(x, residual.contiguous(), weight, eps, out, summed)
    return out, summed


def _normalize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, summed: Tensor | None
) -> None:
    x, weight, size = x.contiguous(), weight.contiguous(), x.shape[-1]
    functions().rms_norm(
        x.data_ptr(), pointer(residual), weight.data_ptr(), DTYPES[x.dtype], x.numel() // size, size, eps,
        out.data_ptr(), pointer(summed), torch.get_num_threads(),
    )  # fmt: skip


# --- swiglu ----------------------------------------------------------------------------------------------------------


def _leaves_swiglu(gate: Tensor, up: Tensor | None = None) -> bool:
    return not _takes(gate, up) or (gate.shape[-1] % 2 != 0 if up is None else up.shape != gate.shape)


@_dispatch.register("swiglu", "cpu", leaves=_leaves_swiglu)
def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    return cpu_swiglu(gate, up)


def _empty(gate: Tensor, up: Tensor | None) -> Tensor:
    return gate.new_empty(*gate.shape[:-1], gate.shape[-1] if up is not None else gate.shape[-1] // 2)


@define(_empty, devices=("CPU",))
def cpu_swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    out = _empty(gate, up)
    columns = out.shape[-1]
    gates = dense_last(gate.reshape(-1, gate.shape[-1]))  # [R, F], or [R, 2F]
    ups = gates[:, columns:] if up is None else dense_last(up.reshape(-1, columns))
    functions().swiglu(
        gates.data_ptr(), gates.stride(0), ups.data_ptr(), ups.stride(0), DTYPES[gate.dtype], len(gates), columns,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


# --- apply_rope ------------------------------------------------------------------------------------------------------


def _leaves_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False
) -> bool:
    if interleaved or not _takes(q, k) or not (cos.is_cpu and cos.dtype == sin.dtype == torch.float32):
        return True
    if q.ndim != 4 or k.ndim != 4 or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3] or q.shape[3] % 2:
        return True
    batch, _, tokens, dim = q.shape
    if cos.shape != sin.shape or cos.stride() != sin.stride() or cos.stride(-1) != 1 or cos.shape[-1] != dim // 2:
        return True
    if positions is None:
        return cos.ndim != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != tokens
    return cos.ndim != 2 or not positions.is_cpu or positions.shape != (batch, tokens)


@_dispatch.register("apply_rope", "cpu", leaves=_leaves_rope)
def apply_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    return cpu_apply_rope(q, k, cos, sin, positions)


def _turned(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """The heads of a token lie side by side, as products leave them."""
    q_out, k_out = (x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k))
    return q_out, k_out


@define(_turned, devices=("CPU",))
def cpu_apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    q_out, k_out = _turned(q, k)
    q, k = dense_last(q), dense_last(k)
    batch, heads, tokens, dim = q.shape
    positions = None if positions is None else positions.long().contiguous()
    row_step = 0 if cos.ndim == 2 or cos.shape[0] == 1 else cos.stride(0)
    failed = functions().apply_rope(
        q.data_ptr(), strides(q), heads, k.data_ptr(), strides(k), k.shape[1], cos.data_ptr(), sin.data_ptr(),
        row_step, cos.stride(-2), pointer(positions), cos.shape[0], DTYPES[q.dtype], batch, tokens, dim,
        q_out.data_ptr(), k_out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise IndexError(f"apply_rope: a position is outside of the table's {cos.shape[0]} rows")
    return q_out, k_out
