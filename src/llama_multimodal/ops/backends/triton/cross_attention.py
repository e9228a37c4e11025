"""Ragged cross-attention: every text token reads its own contiguous range of packed vision tokens.

A tile is some neighbouring tokens of a row with all query heads of one group, so that the group's keys are read once.
It visits the keys from the first to the last that any of its tokens reads; tokens that read nothing visit none. One
token a row goes to the decoding kernel, which divides a row's keys among programs.

Backward, the queries' gradients are tiled in the same way. A block of keys adds up its gradients over the tiles that
read it, in a fixed order: no atomic additions, the same bits on every run.

Shapes: B rows · H query heads · Hkv key heads · G heads of a group · T text tokens · S vision tokens · D head dim
L tiles of a row
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._dispatch import register
from ...cross_attention import KeyRanges
from ..operators import define, differentiate
from .decode_attention import refuses_heads, triton_range_attention
from .library import LOG2_E, WIDE, launch, power, refused, refused_indices, unit_last, upcasts, widen

_SCAN = tl.constexpr(1024)  # tiles whose ranges are looked through at a time
_BLOCKS = {
    (2, 64): ((64, 64, 4), (64, 64, 4), (64, 64, 8)),
    (2, 128): ((64, 32, 4), (64, 32, 4), (32, 64, 8)),
    (2, 256): ((64, 64, 8), (32, 32, 4), (32, 32, 8)),
    (4, 64): ((16, 16, 4), (16, 16, 4), (16, 16, 4)),
    (4, 128): ((16, 16, 4), (16, 16, 4), (16, 16, 4)),
    (4, 256): ((32, 16, 8), (32, 16, 8), (32, 16, 8)),
}
"""Bytes of a value (4 or more), head dim at most → rows of a tile, keys of a step and warps, for each of the three
kernels: of the sizes tried the largest at which ptxas spills no register for sm_80, 90 and 100."""


@triton.jit
def _ranges(ranges_ptr, b, token, inside, tokens, keys):
    """First and end of each row's keys, within 0 to `keys`; and those of all of them together."""
    at = (b * tokens + token) * 2
    first = tl.maximum(tl.load(ranges_ptr + at, mask=inside, other=0), 0).to(tl.int32)
    end = tl.minimum(tl.load(ranges_ptr + at + 1, mask=inside, other=0), keys).to(tl.int32)
    some = first < end
    return first, end, tl.min(tl.where(some, first, keys), 0), tl.max(tl.where(some, end, 0), 0)


@triton.jit
def _tile(tokens, kv_heads, GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr):
    """The program's row and key head; for each row of its tile the token, the query head, and whether it is there."""
    tiles = tl.cdiv(tokens, TOKENS)
    kv_head = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    b = (tl.program_id(0) // tiles // kv_heads).to(tl.int64)
    row = tl.arange(0, TOKENS * HEADS)
    token = (tl.program_id(0) % tiles) * TOKENS + row // HEADS
    head = kv_head * GROUP + row % HEADS
    inside = (token < tokens) & (row % HEADS < GROUP)
    return b, kv_head, token, head, inside


@triton.jit(do_not_specialize=["tokens", "keys"])
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    ranges_ptr,  # [B, T, 2]
    out_ptr,  # [B, T, H, D]
    log_ptr,  # [B, T, H], log2 of each softmax's denominator
    tokens,  # T
    keys,  # S
    kv_heads,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    k_stride_h,
    k_stride_s,
    v_stride_h,
    v_stride_s,
    SCALE: tl.constexpr,  # log2 e / √D
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,  # GROUP, padded
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # DIM, padded
    TOKENS: tl.constexpr,  # of a tile
    KEYS: tl.constexpr,  # of a step
):
    b, kv_head, token, head, inside = _tile(tokens, kv_heads, GROUP, HEADS, TOKENS)
    first, end, least, most = _ranges(ranges_ptr, b, token, inside, tokens, keys)

    dim = tl.arange(0, WIDTH)[None, :]
    mask = inside[:, None] & (dim < DIM)
    q_at = b * q_stride_b + head * q_stride_h + token.to(tl.int64) * q_stride_t
    q = widen(tl.load(q_ptr + q_at[:, None] + dim, mask=mask, other=0.0), UPCAST)
    k_ptr += kv_head * k_stride_h
    v_ptr += kv_head * v_stride_h
    largest = tl.full([TOKENS * HEADS], float("-inf"), WIDE)
    total = tl.zeros([TOKENS * HEADS], WIDE)
    out = tl.zeros([TOKENS * HEADS, WIDTH], WIDE)
    for start in range(least, most, KEYS):
        key = start + tl.arange(0, KEYS)
        key_mask = (key < most)[:, None] & (dim < DIM)
        k = tl.load(k_ptr + key.to(tl.int64)[:, None] * k_stride_s + dim, mask=key_mask, other=0.0)
        scores = tl.dot(q, tl.trans(widen(k, UPCAST)), input_precision="ieee", out_dtype=WIDE) * SCALE
        seen = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(largest - base)
        total = total * kept + tl.sum(weights, 1)
        v = tl.load(v_ptr + key.to(tl.int64)[:, None] * v_stride_s + dim, mask=key_mask, other=0.0)
        weights = widen(weights.to(v.dtype), UPCAST)
        out = out * kept[:, None] + tl.dot(weights, widen(v, UPCAST), input_precision="ieee", out_dtype=WIDE)
        largest = new_largest
    none = total == 0
    out = out / tl.where(none, 1.0, total)[:, None]
    at = (b * tokens + token) * kv_heads * GROUP + head
    tl.store(out_ptr + at[:, None] * DIM + dim, out.to(out_ptr.dtype.element_ty), mask=mask)
    log = tl.where(none, 0.0, largest) + tl.log2(tl.where(none, 1.0, total))
    tl.store(log_ptr + at, log, mask=inside)


@triton.jit(do_not_specialize=["tokens", "keys"])
def _backward_q(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    ranges_ptr,
    out_ptr,
    log_ptr,
    q_grad_ptr,  # [B, T, H, D]
    share_ptr,  # [B, T, H], Σ grad · out, for the other kernel
    tile_first_ptr,  # [B, L], first of a tile's keys, for the other kernel
    tile_end_ptr,
    tokens,
    keys,
    kv_heads,
    grad_stride_b,
    grad_stride_h,
    grad_stride_t,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    k_stride_h,
    k_stride_s,
    v_stride_h,
    v_stride_s,
    SCALE: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
):
    b, kv_head, token, head, inside = _tile(tokens, kv_heads, GROUP, HEADS, TOKENS)
    first, end, least, most = _ranges(ranges_ptr, b, token, inside, tokens, keys)
    if kv_head == 0:
        tiles = tl.cdiv(tokens, TOKENS)
        tile = b * tiles + tl.program_id(0) % tiles
        tl.store(tile_first_ptr + tile, least)
        tl.store(tile_end_ptr + tile, most)

    dim = tl.arange(0, WIDTH)[None, :]
    mask = inside[:, None] & (dim < DIM)
    at = (b * tokens + token) * kv_heads * GROUP + head
    q_at = b * q_stride_b + head * q_stride_h + token.to(tl.int64) * q_stride_t
    grad_at = b * grad_stride_b + head * grad_stride_h + token.to(tl.int64) * grad_stride_t
    q = widen(tl.load(q_ptr + q_at[:, None] + dim, mask=mask, other=0.0), UPCAST)
    grad = tl.load(grad_ptr + grad_at[:, None] + dim, mask=mask, other=0.0)
    out = tl.load(out_ptr + at[:, None] * DIM + dim, mask=mask, other=0.0)
    share = tl.sum(grad.to(WIDE) * out.to(WIDE), 1)
    tl.store(share_ptr + at, share, mask=inside)
    grad = widen(grad, UPCAST)
    log = tl.load(log_ptr + at, mask=inside, other=0.0)
    k_ptr += kv_head * k_stride_h
    v_ptr += kv_head * v_stride_h
    q_grad = tl.zeros([TOKENS * HEADS, WIDTH], WIDE)
    for start in range(least, most, KEYS):
        key = start + tl.arange(0, KEYS)
        key_mask = (key < most)[:, None] & (dim < DIM)
        k = tl.load(k_ptr + key.to(tl.int64)[:, None] * k_stride_s + dim, mask=key_mask, other=0.0)
        v = tl.load(v_ptr + key.to(tl.int64)[:, None] * v_stride_s + dim, mask=key_mask, other=0.0)
        k = widen(k, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=WIDE) * SCALE
        seen = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
        weights = tl.exp2(tl.where(seen, scores - log[:, None], float("-inf")))
        slope = tl.dot(grad, tl.trans(widen(v, UPCAST)), input_precision="ieee", out_dtype=WIDE) - share[:, None]
        slope = widen((weights * slope).to(v.dtype), UPCAST)
        q_grad += tl.dot(slope, k, input_precision="ieee", out_dtype=WIDE)
    q_grad = q_grad * (SCALE / LOG2_E)
    tl.store(q_grad_ptr + at[:, None] * DIM + dim, q_grad.to(q_grad_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tokens", "keys"])
def _backward_kv(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    ranges_ptr,
    log_ptr,
    share_ptr,
    tile_first_ptr,
    tile_end_ptr,
    k_grad_ptr,  # [Hkv, S, D]
    v_grad_ptr,
    rows,  # B
    tokens,
    keys,
    kv_heads,
    grad_stride_b,
    grad_stride_h,
    grad_stride_t,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    k_stride_h,
    k_stride_s,
    v_stride_h,
    v_stride_s,
    SCALE: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,  # tiles of TOKENS in a tile of the other kernel
    KEYS: tl.constexpr,  # of the program
):
    tiles = tl.cdiv(tokens, TOKENS * PARTS)
    blocks = tl.cdiv(keys, KEYS)
    start = (tl.program_id(0) % blocks) * KEYS
    kv_head = (tl.program_id(0) // blocks).to(tl.int64)
    key = start + tl.arange(0, KEYS)
    dim = tl.arange(0, WIDTH)[None, :]
    key_mask = (key < keys)[:, None] & (dim < DIM)
    k_at = kv_head * k_stride_h + key.to(tl.int64) * k_stride_s
    v_at = kv_head * v_stride_h + key.to(tl.int64) * v_stride_s
    k = widen(tl.load(k_ptr + k_at[:, None] + dim, mask=key_mask, other=0.0), UPCAST)
    v = widen(tl.load(v_ptr + v_at[:, None] + dim, mask=key_mask, other=0.0), UPCAST)

    # The tiles that may read these keys lie between the first and the last that does.
    first_tile = rows * tiles
    last_tile = -1
    for some in range(0, rows * tiles, _SCAN):
        tile = some + tl.arange(0, _SCAN)
        held = tile < rows * tiles
        reads = tl.load(tile_first_ptr + tile, mask=held, other=0) < start + KEYS
        reads = reads & (tl.load(tile_end_ptr + tile, mask=held, other=0) > start)
        first_tile = tl.minimum(first_tile, tl.min(tl.where(reads, tile, rows * tiles), 0))
        last_tile = tl.maximum(last_tile, tl.max(tl.where(reads, tile, -1), 0))

    row = tl.arange(0, TOKENS * HEADS)
    head = kv_head * GROUP + row % HEADS
    k_grad = tl.zeros([KEYS, WIDTH], WIDE)
    v_grad = tl.zeros([KEYS, WIDTH], WIDE)
    for part in range(first_tile * PARTS, (last_tile + 1) * PARTS):
        b = tl.zeros([1], tl.int64) + part // (tiles * PARTS)  # made wide in a way that the interpreter has, too
        token = part % (tiles * PARTS) * TOKENS + row // HEADS
        inside = (token < tokens) & (row % HEADS < GROUP)
        first, end, _, _ = _ranges(ranges_ptr, b, token, inside, tokens, keys)
        mask = inside[:, None] & (dim < DIM)
        at = (b * tokens + token) * kv_heads * GROUP + head
        q_at = b * q_stride_b + head * q_stride_h + token.to(tl.int64) * q_stride_t
        grad_at = b * grad_stride_b + head * grad_stride_h + token.to(tl.int64) * grad_stride_t
        q = widen(tl.load(q_ptr + q_at[:, None] + dim, mask=mask, other=0.0), UPCAST)
        grad = widen(tl.load(grad_ptr + grad_at[:, None] + dim, mask=mask, other=0.0), UPCAST)
        log = tl.load(log_ptr + at, mask=inside, other=0.0)
        share = tl.load(share_ptr + at, mask=inside, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=WIDE) * SCALE  # [KEYS, rows of the tile]
        seen = (key[:, None] >= first[None, :]) & (key[:, None] < end[None, :])
        weights = tl.exp2(tl.where(seen, scores - log[None, :], float("-inf")))
        narrow = widen(weights.to(k_grad_ptr.dtype.element_ty), UPCAST)
        v_grad += tl.dot(narrow, grad, input_precision="ieee", out_dtype=WIDE)
        slope = tl.dot(v, tl.trans(grad), input_precision="ieee", out_dtype=WIDE) - share[None, :]
        slope = widen((weights * slope).to(k_grad_ptr.dtype.element_ty), UPCAST)
        k_grad += tl.dot(slope, q, input_precision="ieee", out_dtype=WIDE)
    k_grad = k_grad * (SCALE / LOG2_E)
    at = (kv_head * keys + key) * DIM
    tl.store(k_grad_ptr + at[:, None] + dim, k_grad.to(k_grad_ptr.dtype.element_ty), mask=key_mask)
    tl.store(v_grad_ptr + at[:, None] + dim, v_grad.to(v_grad_ptr.dtype.element_ty), mask=key_mask)


def _plan(q: Tensor, kv_heads: int, kernel: int) -> tuple[dict[str, Any], int]:
    """What a kernel (its place in `_BLOCKS`) is compiled for, and its warps."""
    dim, group = q.shape[3], q.shape[1] // kv_heads
    heads, width = power(group), max(16, power(dim))
    rows, keys, warps = _BLOCKS[min(4, q.element_size()), max(64, width)][kernel]
    constants = {
        "SCALE": LOG2_E.value / math.sqrt(dim),
        "WIDE": WIDE[q.dtype],
        "UPCAST": upcasts(q),
        "GROUP": group,
        "HEADS": heads,
        "DIM": dim,
        "WIDTH": width,
        "TOKENS": max(1, rows // heads),
        "KEYS": keys,
    }
    return constants, warps


def _empty(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(batch, tokens, heads, dim).transpose(1, 2)  # as the projection behind it reads it
    return out, q.new_empty(batch, tokens, heads, dtype=wide)


@define(_empty)
def triton_cross_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The attention [B, H, T, D], and the softmaxes' logarithms [B, T, H] for the backward pass."""
    q, k, v = unit_last(q), unit_last(k), unit_last(v)
    out, log = _empty(q, k, v, table)
    constants, warps = _plan(q, k.shape[0], 0)
    launch(
        _forward,
        q.shape[0] * k.shape[0] * triton.cdiv(q.shape[2], constants["TOKENS"]),
        q,
        k,
        v,
        table.contiguous(),
        out,
        log,
        q.shape[2],
        k.shape[1],
        k.shape[0],
        *q.stride()[:3],
        *k.stride()[:2],
        *v.stride()[:2],
        **constants,
        warps=warps,
    )
    return out, log


def _empty_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    return q.new_empty(batch, tokens, heads, dim).transpose(1, 2), k.new_empty(k.shape), v.new_empty(v.shape)


@define(_empty_gradients)
def triton_cross_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, out: Tensor, log: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v, table = unit_last(grad), unit_last(q), unit_last(k), unit_last(v), table.contiguous()
    out = out.transpose(1, 2).contiguous()
    q_grad, k_grad, v_grad = _empty_gradients(grad, q, k, v)
    constants, warps = _plan(q, k.shape[0], 1)
    constants_kv, warps_kv = _plan(q, k.shape[0], 2)
    tiles = triton.cdiv(q.shape[2], constants["TOKENS"])
    share = torch.empty_like(log)
    bounds = table.new_empty(2, q.shape[0] * tiles, dtype=torch.int32)
    strides = (*grad.stride()[:3], *q.stride()[:3], *k.stride()[:2], *v.stride()[:2])
    launch(
        _backward_q,
        q.shape[0] * k.shape[0] * tiles,
        grad,
        q,
        k,
        v,
        table,
        out,
        log,
        q_grad,
        share,
        bounds[0],
        bounds[1],
        q.shape[2],
        k.shape[1],
        k.shape[0],
        *strides,
        **constants,
        warps=warps,
    )
    launch(
        _backward_kv,
        k.shape[0] * triton.cdiv(k.shape[1], constants_kv["KEYS"]),
        grad,
        q,
        k,
        v,
        table,
        log,
        share,
        bounds[0],
        bounds[1],
        k_grad,
        v_grad,
        q.shape[0],
        q.shape[2],
        k.shape[1],
        k.shape[0],
        *strides,
        **constants_kv,
        PARTS=constants["TOKENS"] // constants_kv["TOKENS"],
        warps=warps_kv,
    )
    return q_grad, k_grad, v_grad


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: Any, grad: Tensor, log_grad: Tensor) -> tuple[Tensor | None, ...]:
    return *triton_cross_attention_backward(grad, *ctx.saved_tensors), None


differentiate(triton_cross_attention, _gradients, _setup)


def _refuses(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges) -> str | None:
    if q.ndim != 4 or k.ndim != 3 or v.shape != k.shape:
        return (
            f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)};"
            " takes [B, H, T, D] and [Hkv, S, D] twice"
        )
    if ranges.table.shape != (q.shape[0], q.shape[2], 2):
        return f"ranges.table has shape {tuple(ranges.table.shape)}; takes [B, T, 2] for q {tuple(q.shape)}"
    return (
        refuses_heads(q, k.shape[0], k.shape[2], "k")
        or refused(q=q, k=k, v=v)
        or refused_indices(q, **{"ranges.table": ranges.table})
    )


@register("cross_attention", "triton", refuses=_refuses, differentiable=True)
def cross_attention(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges) -> Tensor:
    wants_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.shape[2] == 1 and not wants_gradient:
        return triton_range_attention(q[:, :, 0], k, v, ranges.table[:, 0])[:, :, None]
    return triton_cross_attention(q, k, v, ranges.table)[0]
