"""Attention of one query a head over cached keys: dense, in blocks, or over a range.

Blocks may be in 8 bits, which are read as they are: each value is a number that fp16 and bf16 hold, so that products
take the values, and scores and weights the scales of their keys.

The query heads that share a key head form a group and read its keys together, so keys are never repeated. A row's
keys are divided among several programs ("splits", as in Flash-Decoding, Dao et al. 2023), each of which leaves a
softmax of its own part; a second kernel joins the parts.

Shapes: B rows · H query heads · Hkv key heads · G heads of a group · D head dim · C slots of a row · N blocks
S slots of a block · M blocks of a row, at most · P splits
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._dispatch import register
from ...quantized_blocks import refused_as_8_bits
from ..operators import define, multiprocessors
from .library import LOG2_E, WIDE, launch, power, refused, refused_indices, unit_last, upcasts, widen

_MOST_DIM = 256
FORMATS = {torch.int8: 1, torch.float8_e4m3fn: 2}  # what FORMAT is; 0 where keys are in the queries' dtype


@triton.jit
def _restore(x, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """Stored values as factors of a product. fp8 comes as whole bytes and is put together by integer arithmetic, since
    only some architectures convert it: in fp16 its bits, three places further up, stand for 2⁻⁸ of the value."""
    if FORMAT == 1:
        return x.to(tl.float32).to(dtype)  # in two steps for the interpreter, which has none from int8 to bfloat16
    elif FORMAT == 2:
        wide = x.to(tl.int16)
        bits = (wide & 0x7F) << 7 | (wide & 0x80) << 8
        value = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256
        return tl.where((wide & 0x7F) == 0x7F, float("nan"), value).to(dtype)
    else:
        return x


@triton.jit(do_not_specialize=["capacity", "splits"])
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    bounds_ptr,  # lengths [B], or ranges [B, 2] where RANGES is on
    blocks_ptr,  # block table [B, M]; bounds_ptr again where PAGE is 0
    bias_ptr,  # [C]; bounds_ptr again where BIAS is off
    k_scales_ptr,  # [N, S, Hkv]; bounds_ptr again where FORMAT is 0, and so with v's
    v_scales_ptr,
    part_ptr,  # [B, H, P, D]; the output [B, H, D] where DIRECT is on
    part_log_ptr,  # [B, H, P]; not used where DIRECT is on
    kv_heads,
    capacity,  # C, or M·S
    num_blocks,  # N
    splits,  # P
    q_stride_b,
    q_stride_h,
    k_stride_outer,  # of a row, or of a block where PAGE is not 0
    k_stride_h,
    k_stride_key,
    v_stride_outer,
    v_stride_h,
    v_stride_key,
    bounds_stride,
    blocks_stride,
    scales_stride,  # of a block; those of a slot and a head are Hkv and 1
    SCALE: tl.constexpr,  # log2 e / √D
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
    RANGES: tl.constexpr,
    PAGE: tl.constexpr,  # S, or 0 for dense keys
    FORMAT: tl.constexpr,
    BIAS: tl.constexpr,
    DIRECT: tl.constexpr,  # one split: nothing to join
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,  # GROUP, padded
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # DIM, padded
    KEYS: tl.constexpr,  # of a step
):
    split = tl.program_id(0) % splits
    kv_head = (tl.program_id(0) // splits % kv_heads).to(tl.int64)
    b = (tl.program_id(0) // splits // kv_heads).to(tl.int64)
    if RANGES:
        first = tl.maximum(tl.load(bounds_ptr + b * bounds_stride), 0).to(tl.int32)
        end = tl.minimum(tl.load(bounds_ptr + b * bounds_stride + 1), capacity).to(tl.int32)
    else:
        first = 0
        end = tl.minimum(tl.load(bounds_ptr + b * bounds_stride), capacity).to(tl.int32)
    # Divided by what the row holds, not by what it could hold: every split has work, whatever the capacity.
    share = tl.cdiv(tl.cdiv(tl.maximum(end - first, 0), splits), KEYS) * KEYS
    first += split * share
    end = tl.minimum(end, first + share)

    member = tl.arange(0, HEADS)
    head = kv_head * GROUP + member
    dim = tl.arange(0, WIDTH)
    q_mask = (member < GROUP)[:, None] & (dim < DIM)[None, :]
    q = tl.load(q_ptr + b * q_stride_b + head[:, None] * q_stride_h + dim[None, :], mask=q_mask, other=0.0)
    factor: tl.constexpr = q.dtype
    q = widen(q, UPCAST)
    k_ptr += kv_head * k_stride_h
    v_ptr += kv_head * v_stride_h
    if PAGE == 0:
        k_ptr += b * k_stride_outer
        v_ptr += b * v_stride_outer

    largest = tl.full([HEADS], float("-inf"), WIDE)
    total = tl.zeros([HEADS], WIDE)
    out = tl.zeros([HEADS, WIDTH], WIDE)
    for start in range(first, end, KEYS):
        key = start + tl.arange(0, KEYS)
        seen = key < end
        if PAGE == 0:
            held = seen
            k_at, v_at = key.to(tl.int64) * k_stride_key, key.to(tl.int64) * v_stride_key
        else:
            block = tl.load(blocks_ptr + b * blocks_stride + key // PAGE, mask=seen, other=0).to(tl.int64)
            held = seen & (block >= 0) & (block < num_blocks)
            k_at = block * k_stride_outer + (key % PAGE) * k_stride_key
            v_at = block * v_stride_outer + (key % PAGE) * v_stride_key
        mask = held[:, None] & (dim < DIM)[None, :]
        k = tl.load(k_ptr + k_at[:, None] + dim[None, :], mask=mask, other=0)  # [KEYS, WIDTH]
        k = widen(_restore(k, factor, FORMAT), UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=WIDE) * SCALE
        if FORMAT != 0:
            scales_at = block * scales_stride + (key % PAGE) * kv_heads + kv_head
            scores *= tl.load(k_scales_ptr + scales_at, mask=held, other=0.0).to(WIDE)[None, :]
        if BIAS:
            scores += tl.load(bias_ptr + key, mask=seen, other=0.0).to(WIDE)[None, :] * LOG2_E
        if PAGE != 0:  # a block that the cache does not have: NaN shows, where other keys would pass for right
            scores = tl.where(held[None, :], scores, float("nan"))
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(largest - base)
        v = tl.load(v_ptr + v_at[:, None] + dim[None, :], mask=mask, other=0)
        total = total * kept + tl.sum(weights, 1)
        if FORMAT != 0:  # by the step's largest scale, the others are at most 1: none is too small for fp16
            v_scales = tl.load(v_scales_ptr + scales_at, mask=held, other=0.0).to(WIDE)
            step_scale = tl.max(v_scales, 0)
            weights *= (v_scales / tl.where(step_scale == 0, 1.0, step_scale))[None, :]
        weights, v = widen(weights.to(factor), UPCAST), widen(_restore(v, factor, FORMAT), UPCAST)
        added = tl.dot(weights, v, input_precision="ieee", out_dtype=WIDE)
        if FORMAT != 0:
            added *= step_scale
        out = out * kept[:, None] + added
        largest = new_largest

    out = out / tl.where(total == 0, 1.0, total)[:, None]
    row = b * kv_heads * GROUP + head  # of [B, H]
    if DIRECT:
        tl.store(part_ptr + row[:, None] * DIM + dim[None, :], out.to(part_ptr.dtype.element_ty), mask=q_mask)
    else:
        row = row * splits + split
        tl.store(part_ptr + row[:, None] * DIM + dim[None, :], out, mask=q_mask)
        tl.store(part_log_ptr + row, largest + tl.log2(total), mask=member < GROUP)


@triton.jit(do_not_specialize=["splits"])
def _join(
    part_ptr, part_log_ptr, out_ptr, splits,
    WIDE: tl.constexpr, SPLITS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    log = tl.load(part_log_ptr + row * splits + split, mask=split < splits, other=float("-inf"))
    largest = tl.max(log, 0)
    weights = tl.exp2(log - tl.where(largest == float("-inf"), 0.0, largest))
    mask = (split < splits)[:, None] & (dim < DIM)[None, :]
    part = tl.load(part_ptr + (row * splits + split[:, None]) * DIM + dim[None, :], mask=mask, other=0.0)
    total = tl.sum(weights, 0)
    out = tl.sum(part * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + row * DIM + dim, out.to(out_ptr.dtype.element_ty), mask=dim < DIM)


def count_splits(pairs: int, capacity: int, keys: int, at_once: int) -> int:
    """Splits of a row: enough programs for two a multiprocessor, but no split of less than four steps.

    pairs: rows times key heads; keys: of a step; at_once: multiprocessors.
    """
    wanted = triton.cdiv(2 * at_once, max(1, pairs))
    return max(1, min(wanted, capacity // (4 * keys), 64))


def _run(
    q: Tensor,  # [B, H, D]
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    blocks: Tensor | None,
    bias: Tensor | None,
    kv_heads: int,
    capacity: int,
    page: int,
    k_strides: tuple[int, int, int],  # of a row or block, a head, a key
    v_strides: tuple[int, int, int],
    *,
    scales: tuple[Tensor, Tensor] | None = None,  # of blocks in 8 bits
) -> Tensor:
    rows, heads, dim = q.shape
    width = max(16, power(dim))
    full, quantized = q.element_size() > 2, scales is not None
    keys = max(16, min(64, 16384 // (width * q.element_size())) // (2 if full and quantized else 1))
    splits = count_splits(rows * kv_heads, capacity, keys, multiprocessors(q.device))
    out = q.new_empty(rows, heads, dim)
    parts, logs = out, out
    if splits > 1:
        wide = torch.promote_types(q.dtype, torch.float32)
        parts = q.new_empty(rows, heads, splits, dim, dtype=wide)
        logs = q.new_empty(rows, heads, splits, dtype=wide)
    launch(
        _attend,
        rows * kv_heads * splits,
        q,
        as_bytes(k),
        as_bytes(v),
        bounds,
        bounds if blocks is None else blocks,
        bounds if bias is None else bias,
        *((bounds, bounds) if scales is None else scales),
        parts,
        logs,
        kv_heads,
        capacity,
        k.shape[0],
        splits,
        q.stride(0),
        q.stride(1),
        *k_strides,
        *v_strides,
        bounds.stride(0),
        0 if blocks is None else blocks.stride(0),
        page * kv_heads,
        SCALE=LOG2_E.value / math.sqrt(dim),
        WIDE=WIDE[q.dtype],
        UPCAST=upcasts(q),
        RANGES=bounds.ndim == 2,
        PAGE=page,
        FORMAT=FORMATS.get(k.dtype, 0),
        BIAS=bias is not None,
        DIRECT=splits == 1,
        GROUP=heads // kv_heads,
        HEADS=max(16, power(heads // kv_heads)),
        DIM=dim,
        WIDTH=width,
        KEYS=keys,
        # A product in fp32 is taken without tensor cores, and keys in 8 bits are widened in registers: four warps would
        # spill (255 registers each for sm_90).
        warps=8 if width > 64 and (full or quantized) else 4,
        stages=3 if q.element_size() == 2 else 2,
    )
    if splits > 1:
        launch(
            _join,
            rows * heads,
            parts,
            logs,
            out,
            splits,
            WIDE=WIDE[q.dtype],
            SPLITS=power(splits),
            DIM=dim,
            WIDTH=width,
            warps=4,
        )
    return out


def _empty(q: Tensor, *_: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)


@define(_empty)
def triton_decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, key_bias: Tensor | None) -> Tensor:
    q, k, v = unit_last(q), unit_last(k), unit_last(v)
    bias = None if key_bias is None else key_bias.contiguous()
    strides = [(x.stride(0), x.stride(1), x.stride(2)) for x in (k, v)]
    return _run(q, k, v, lengths, None, bias, k.shape[1], k.shape[2], 0, *strides)


@define(_empty)
def triton_range_attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> Tensor:
    """One query a row over keys that all rows share; q: [B, H, D], k, v: [Hkv, C, D], ranges: [B, 2]."""
    q, k, v, ranges = unit_last(q), unit_last(k), unit_last(v), unit_last(ranges)
    strides = [(0, x.stride(0), x.stride(1)) for x in (k, v)]
    return _run(q, k, v, ranges, None, None, k.shape[0], k.shape[1], 0, *strides)


@define(_empty)
def triton_paged_decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor
) -> Tensor:
    return _run_paged(q, k_cache, v_cache, block_table, lengths)


@define(_empty)
def triton_quantized_paged_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    block_table: Tensor,
    lengths: Tensor,
) -> Tensor:
    return _run_paged(q, k_cache, v_cache, block_table, lengths, (k_scales, v_scales))


def _run_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    slots, kv_heads = k_cache.shape[1:3]
    if not q.is_cuda:
        _check_blocks(k_cache, block_table, lengths)
    q, k, v, blocks = unit_last(q), unit_last(k_cache), unit_last(v_cache), unit_last(block_table)
    strides = [(x.stride(0), x.stride(2), x.stride(1)) for x in (k, v)]
    capacity = block_table.shape[1] * slots
    return _run(q, k, v, lengths, blocks, None, kv_heads, capacity, slots, *strides, scales=scales)


def as_bytes(cache: Tensor) -> Tensor:
    """fp8 as whole numbers, which every architecture reads."""
    return cache.view(torch.int8) if cache.dtype == torch.float8_e4m3fn else cache


def _check_blocks(cache: Tensor, block_table: Tensor, lengths: Tensor) -> None:
    """Raises:
    IndexError: a row's length needs a block that the cache does not have (a GPU does not wait to look; it gives NaN).
    """
    used = torch.arange(block_table.shape[1]) * cache.shape[1] < lengths[:, None]
    wrong = block_table[used & ((block_table < 0) | (block_table >= cache.shape[0]))]
    if wrong.numel():
        raise IndexError(f"paged_decode_attention: block_table names block {int(wrong[0])} of {cache.shape[0]}")


def refuses_heads(q: Tensor, kv_heads: int, dim: int, k: str) -> str | None:
    if q.shape[-1] != dim or dim > _MOST_DIM:
        return f"q has head dim {q.shape[-1]}, {k} {dim}; takes one, of {_MOST_DIM} at most"
    if kv_heads == 0 or q.shape[1] % kv_heads:
        return f"q has {q.shape[1]} heads, {k} {kv_heads}; takes a multiple"
    return None


def _refuses_decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, key_bias: Tensor | None = None) -> str | None:
    if q.ndim != 3 or k.ndim != 4 or k.shape[0] != q.shape[0]:
        return f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}; takes [B, H, D] and [B, Hkv, C, D]"
    if v.shape != k.shape:
        return f"v has shape {tuple(v.shape)}; takes that of k, {tuple(k.shape)}"
    if lengths.shape != q.shape[:1]:
        return f"lengths has shape {tuple(lengths.shape)}; takes [B] = [{q.shape[0]}]"
    if key_bias is not None and (key_bias.shape != k.shape[2:3] or key_bias.device != q.device):
        return f"key_bias has shape {tuple(key_bias.shape)} on {key_bias.device}; takes [C] = [{k.shape[2]}] beside q"
    return (
        refuses_heads(q, k.shape[1], k.shape[3], "k") or refused(q=q, k=k, v=v) or refused_indices(q, lengths=lengths)
    )


def _refuses_paged(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor) -> str | None:
    why = _refuses_blocks(q, k_cache, v_cache, block_table, lengths)
    return why or refused(q=q, k_cache=k_cache, v_cache=v_cache)


def _refuses_quantized(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    block_table: Tensor,
    lengths: Tensor,
) -> str | None:
    if why := _refuses_blocks(q, k_cache, v_cache, block_table, lengths) or refused(q=q):
        return why
    return refused_as_8_bits(k_cache, v_cache, k_scales, v_scales, q.device)


def _refuses_blocks(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor) -> str | None:
    """Why not these shapes, whatever the dtypes of the caches are."""
    if q.ndim != 3 or k_cache.ndim != 4:
        return f"q has shape {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}; takes [B, H, D] and [N, S, Hkv, D]"
    if v_cache.shape != k_cache.shape:
        return f"v_cache has shape {tuple(v_cache.shape)}; takes that of k_cache, {tuple(k_cache.shape)}"
    if block_table.ndim != 2 or block_table.shape[:1] != q.shape[:1] or lengths.shape != q.shape[:1]:
        return (
            f"block_table has shape {tuple(block_table.shape)}, lengths {tuple(lengths.shape)};"
            f" takes [B, M] and [B], B = {q.shape[0]}"
        )
    return refuses_heads(q, k_cache.shape[2], k_cache.shape[3], "k_cache") or refused_indices(
        q, block_table=block_table, lengths=lengths
    )


@register("decode_attention", "triton", refuses=_refuses_decode)
def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, key_bias: Tensor | None = None) -> Tensor:
    return triton_decode_attention(q, k, v, lengths, key_bias)


register("paged_decode_attention", "triton", refuses=_refuses_paged)(triton_paged_decode_attention)
register("quantized_paged_decode_attention", "triton", refuses=_refuses_quantized)(
    triton_quantized_paged_decode_attention
)
