"""`ops.kv_write`: new keys and values, each token to its slot of a paged cache, as it is or in 8 bits.

A head's 8 bits and their scale are those of `ops.quantized_blocks.quantize`, bit by bit: divisions are rounded to the
nearest, and fp8 is put together by integer arithmetic, since only some architectures convert to it.

Shapes: T tokens · Hkv key heads · D head dim · N blocks · S slots of a block
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._dispatch import register
from ...quantized_blocks import LIMITS, refused_as_8_bits
from ..operators import define
from .decode_attention import FORMATS, as_bytes
from .library import launch, power, refused, refused_indices, unit_last

_VALUES = 1024  # of a program's tile


@triton.jit(do_not_specialize=["num_slots"])
def _store(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    num_slots,  # N·S
    columns,  # Hkv·D
    dim,  # D
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    slots_stride,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + t * slots_stride).to(tl.int64)
    kept = (slot >= 0) & (slot < num_slots)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = (column < columns) & kept
        head, place = (column // dim).to(tl.int64), column % dim
        at = slot * columns + column
        k = tl.load(k_ptr + t * k_stride_t + head * k_stride_h + place, mask=mask)
        v = tl.load(v_ptr + t * v_stride_t + head * v_stride_h + place, mask=mask)
        tl.store(k_cache_ptr + at, k.to(k_cache_ptr.dtype.element_ty), mask=mask)
        tl.store(v_cache_ptr + at, v.to(v_cache_ptr.dtype.element_ty), mask=mask)


@define(lambda k, v, k_cache, v_cache, slots: None, mutates=("k_cache", "v_cache"))
def triton_kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    num_slots, (heads, dim) = _slots_of(k_cache, slots), k_cache.shape[2:]
    k, v = unit_last(k), unit_last(v)
    launch(
        _store,
        k.shape[0],
        k,
        v,
        k_cache,
        v_cache,
        slots,
        num_slots,
        heads * dim,
        dim,
        *k.stride()[:2],
        *v.stride()[:2],
        slots.stride(0),
        BLOCK=min(_VALUES, power(heads * dim)),
        warps=4,
    )


@triton.jit
def _to_nearest(x):
    """Whole numbers, halves to the even one: beside 1.5 · 2²³ a float has no room for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _in_8_bits(x, FORMAT: tl.constexpr):
    """Floats within the format's limit as its bytes."""
    if FORMAT == 1:
        return _to_nearest(x).to(tl.int8)
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Three bits of mantissa are kept, and the exponent counts from -7; below 2⁻⁶ the values are multiples of 2⁻⁹.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    tiny = _to_nearest(tl.abs(x) * 512).to(tl.int32)
    return (tl.where(size < (121 << 23), tiny, normal) | ((bits >> 24) & 0x80)).to(tl.int8)


@triton.jit
def _put_in_8_bits(
    from_ptr, stride_h, cache_ptr, scales_ptr, slot, kept, heads, dim, first,
    FORMAT: tl.constexpr, LIMIT: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Some heads of a token's keys or values."""
    head, place = (first + tl.arange(0, HEADS)).to(tl.int64), tl.arange(0, DIM)
    mask = (head[:, None] < heads) & (place[None, :] < dim) & kept
    x = tl.load(from_ptr + head[:, None] * stride_h + place[None, :], mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), axis=1)
    odd = tl.max((x != x).to(tl.int32), axis=1)  # the largest of numbers and NaN would be a number
    scale = tl.div_rn(tl.where(odd > 0, float("nan"), largest), LIMIT)
    x = tl.div_rn(x, tl.where(scale > 0, scale, 1.0)[:, None])
    x = tl.where(x == x, tl.minimum(tl.maximum(x, -LIMIT), LIMIT), 0.0)
    row = slot * heads + head
    tl.store(cache_ptr + row[:, None] * dim + place[None, :], _in_8_bits(x, FORMAT), mask=mask)
    tl.store(scales_ptr + row, scale, mask=(head < heads) & kept)


@triton.jit(do_not_specialize=["num_slots"])
def _store_in_8_bits(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,
    v_scales_ptr,
    slots_ptr,
    num_slots,  # N·S
    heads,  # Hkv
    dim,  # D
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    slots_stride,
    FORMAT: tl.constexpr,
    LIMIT: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + t * slots_stride).to(tl.int64)
    kept = (slot >= 0) & (slot < num_slots)
    for first in range(0, heads, HEADS):
        _put_in_8_bits(
            k_ptr + t * k_stride_t, k_stride_h, k_cache_ptr, k_scales_ptr, slot, kept, heads, dim, first,
            FORMAT, LIMIT, HEADS, DIM,
        )  # fmt: skip
        _put_in_8_bits(
            v_ptr + t * v_stride_t, v_stride_h, v_cache_ptr, v_scales_ptr, slot, kept, heads, dim, first,
            FORMAT, LIMIT, HEADS, DIM,
        )  # fmt: skip


@define(lambda *_: None, mutates=("k_cache", "v_cache", "k_scales", "v_scales"))
def triton_quantized_kv_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scales: Tensor, v_scales: Tensor, slots: Tensor
) -> None:
    num_slots, (heads, dim) = _slots_of(k_cache, slots), k_cache.shape[2:]
    k, v = unit_last(k), unit_last(v)
    width = power(dim)
    launch(
        _store_in_8_bits,
        k.shape[0],
        k,
        v,
        as_bytes(k_cache),
        as_bytes(v_cache),
        k_scales,
        v_scales,
        slots,
        num_slots,
        heads,
        dim,
        *k.stride()[:2],
        *v.stride()[:2],
        slots.stride(0),
        FORMAT=FORMATS[k_cache.dtype],
        LIMIT=LIMITS[k_cache.dtype],
        HEADS=max(1, min(power(heads), _VALUES // width)),
        DIM=width,
        warps=4,
    )


def _slots_of(cache: Tensor, slots: Tensor) -> int:
    """N · S.

    Raises:
        IndexError: a token is to go past that (a GPU does not wait to look; it drops the token).
    """
    num_slots = cache.shape[0] * cache.shape[1]
    if not slots.is_cuda and slots.numel() and int(slots.max()) >= num_slots:
        raise IndexError(f"kv_write: slots go up to {int(slots.max())}; takes less than N · S = {num_slots}")
    return num_slots


def _refuses_shapes(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> str | None:
    if k.ndim != 3 or v.shape != k.shape or k_cache.ndim != 4 or k_cache.shape[2:] != k.shape[1:]:
        return f"k has shape {tuple(k.shape)}, v {tuple(v.shape)}; takes [T, Hkv, D] for k_cache {tuple(k_cache.shape)}"
    if v_cache.shape != k_cache.shape or not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        return f"v_cache has shape {tuple(v_cache.shape)}; takes caches of one shape, both contiguous"
    if slots.shape != k.shape[:1]:
        return f"slots has shape {tuple(slots.shape)}; takes [T] = [{k.shape[0]}]"
    return refused(k=k, v=v) or refused_indices(k_cache, slots=slots)


def _refuses_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> str | None:
    return _refuses_shapes(k, v, k_cache, v_cache, slots) or refused(k_cache=k_cache, v_cache=v_cache)


def _refuses_quantized(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scales: Tensor, v_scales: Tensor, slots: Tensor
) -> str | None:
    why = _refuses_shapes(k, v, k_cache, v_cache, slots)
    return why or refused_as_8_bits(k_cache, v_cache, k_scales, v_scales, k.device)


register("kv_write", "triton", refuses=_refuses_write)(triton_kv_write)
register("quantized_kv_write", "triton", refuses=_refuses_quantized)(triton_quantized_kv_write)
