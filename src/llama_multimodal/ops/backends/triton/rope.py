"""Rotary position embedding of queries and keys in one launch; its backward pass is the opposite turn.

A program turns some heads of one token, with angles that it loads once.

Shapes: B batch · H heads · T tokens · D head dim · P positions in the table
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..._dispatch import register
from ..operators import define, differentiate
from .library import WIDE, empty_rows, launch, order, power, refused, refused_indices, unit_last


@triton.jit
def _turn(
    x_ptr, out_ptr, head_stride, out_head_stride, head, heads, half, cos, sin,
    WIDE: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    pair = tl.arange(0, HALF)[None, :]
    mask = (head < heads) & (pair < half)
    if INTERLEAVED:
        both = tl.arange(0, 2 * HALF)[None, :]
        both_mask = (head < heads) & (both < 2 * half)
        x = tl.load(x_ptr + head * head_stride + both, mask=both_mask, other=0.0).to(WIDE)
        first, second = tl.split(tl.reshape(x, [HEADS, HALF, 2]))
        turned = tl.join(first * cos - second * sin, second * cos + first * sin)
        turned = tl.reshape(turned, [HEADS, 2 * HALF]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + head * out_head_stride + both, turned, mask=both_mask)
    else:
        x_at, out_at = x_ptr + head * head_stride + pair, out_ptr + head * out_head_stride + pair
        first = tl.load(x_at, mask=mask, other=0.0).to(WIDE)
        second = tl.load(x_at + half, mask=mask, other=0.0).to(WIDE)
        tl.store(out_at, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_at + half, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "positions"])
def _rope(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    rows_ptr,  # the table's row for each token; cos_ptr again where TABLE is off
    tokens,  # T
    positions,  # P
    q_heads,
    k_heads,
    half,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    k_stride_b,
    k_stride_h,
    k_stride_t,
    q_out_stride_b,
    q_out_stride_h,
    q_out_stride_t,
    k_out_stride_b,
    k_out_stride_h,
    k_out_stride_t,
    cos_stride_b,
    cos_stride_t,  # of the table's rows where TABLE is on
    sin_stride_b,
    sin_stride_t,
    rows_stride_b,
    rows_stride_t,
    WIDE: tl.constexpr,
    TABLE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    OPPOSITE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    q_parts = tl.cdiv(q_heads, HEADS)
    parts = q_parts + tl.cdiv(k_heads, HEADS)
    token, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    b, t = (token // tokens).to(tl.int64), (token % tokens).to(tl.int64)
    pair = tl.arange(0, HALF)[None, :]
    mask = pair < half
    if TABLE:
        row = tl.load(rows_ptr + b * rows_stride_b + t * rows_stride_t).to(tl.int64)
        # Outside the table there is no angle: NaN shows where zeros would pass for values.
        mask = mask & (row >= 0) & (row < positions)
        cos_at, sin_at = row * cos_stride_t, row * sin_stride_t
    else:
        cos_at, sin_at = b * cos_stride_b + t * cos_stride_t, b * sin_stride_b + t * sin_stride_t
    cos = tl.load(cos_ptr + cos_at + pair, mask=mask, other=float("nan")).to(WIDE)
    sin = tl.load(sin_ptr + sin_at + pair, mask=mask, other=float("nan")).to(WIDE)
    if OPPOSITE:
        sin = -sin
    if part < q_parts:
        head = part * HEADS + tl.arange(0, HEADS)[:, None]
        x_ptr = q_ptr + b * q_stride_b + t * q_stride_t
        out_ptr = q_out_ptr + b * q_out_stride_b + t * q_out_stride_t
        _turn(x_ptr, out_ptr, q_stride_h, q_out_stride_h, head, q_heads, half, cos, sin, WIDE, INTERLEAVED, HEADS, HALF)
    else:
        head = (part - q_parts) * HEADS + tl.arange(0, HEADS)[:, None]
        x_ptr = k_ptr + b * k_stride_b + t * k_stride_t
        out_ptr = k_out_ptr + b * k_out_stride_b + t * k_out_stride_t
        _turn(x_ptr, out_ptr, k_stride_h, k_out_stride_h, head, k_heads, half, cos, sin, WIDE, INTERLEAVED, HEADS, HALF)


def _empty(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, opposite: bool
) -> tuple[Tensor, Tensor]:
    return empty_rows(q, order(q)), empty_rows(k, order(k))


@define(_empty)
def triton_apply_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, opposite: bool
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    if positions is not None and not positions.is_cuda and positions.numel():
        least, most = int(positions.min()), int(positions.max())
        if least < 0 or most >= cos.shape[0]:
            raise IndexError(f"apply_rope: positions run from {least} to {most}; takes 0 to {cos.shape[0] - 1}")
    q_out, k_out = _empty(q, k, cos, sin, positions, interleaved, opposite)
    q, k, cos, sin = unit_last(q), unit_last(k), unit_last(cos), unit_last(sin)
    if positions is None:
        cos, sin = (x.expand(batch, tokens, dim // 2) for x in (cos, sin))
    half = power(dim // 2)
    block = min(power(max(heads, k.shape[1])), max(1, 1024 // half))
    parts = triton.cdiv(heads, block) + triton.cdiv(k.shape[1], block)
    launch(
        _rope,
        batch * tokens * parts,
        q,
        k,
        q_out,
        k_out,
        cos,
        sin,
        cos if positions is None else positions,
        tokens,
        cos.shape[0],
        heads,
        k.shape[1],
        dim // 2,
        *q.stride()[:3],
        *k.stride()[:3],
        *q_out.stride()[:3],
        *k_out.stride()[:3],
        *cos.stride()[:2] if positions is None else (0, cos.stride(0)),
        *sin.stride()[:2] if positions is None else (0, sin.stride(0)),
        *(0, 0) if positions is None else positions.stride(),
        WIDE=WIDE[q.dtype],
        TABLE=positions is not None,
        INTERLEAVED=interleaved,
        OPPOSITE=opposite,
        HEADS=block,
        HALF=half,
        warps=4 if block * half >= 512 else 1,
    )
    return q_out, k_out


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, positions, ctx.interleaved, ctx.opposite = inputs
    ctx.save_for_backward(cos, sin, positions)


def _gradients(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor | None, ...]:
    q_grad, k_grad = triton_apply_rope(q_grad, k_grad, *ctx.saved_tensors, ctx.interleaved, not ctx.opposite)
    return q_grad, k_grad, None, None, None, None, None


differentiate(triton_apply_rope, _gradients, _setup)


def _refuses(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False
) -> str | None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:] or q.shape[3] % 2:
        return f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}; takes [B, H, T, D] and [B, Hkv, T, D], D even"
    batch, _, tokens, dim = q.shape
    # A list: to look a shape up in a set, torch.compile would fix every number of tokens in a graph of its own.
    shapes = [(batch, tokens, dim // 2), (1, tokens, dim // 2)] if positions is None else [(cos.shape[0], dim // 2)]
    if cos.shape != sin.shape or tuple(cos.shape) not in shapes:
        wanted = "[B, T, D/2]" if positions is None else "a table [P, D/2]"
        return f"cos has shape {tuple(cos.shape)}, sin {tuple(sin.shape)}; takes {wanted} for q {tuple(q.shape)}"
    if positions is not None and positions.shape != (batch, tokens):
        return f"positions has shape {tuple(positions.shape)}; takes [B, T] = {(batch, tokens)}"
    if cos.requires_grad or sin.requires_grad:
        return "cos or sin requires a gradient; the kernel gives none for angles"
    if cos.device != q.device:
        return f"cos is on {cos.device}, q on {q.device}; takes one device"
    return refused(q=q, k=k) or refused(cos=cos, sin=sin) or refused_indices(q, positions=positions)


@register("apply_rope", "triton", refuses=_refuses, differentiable=True)
def apply_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    return triton_apply_rope(q, k, cos, sin, positions, interleaved, False)
