"""`decode_attention` and `paged_decode_attention` on CPUs, for fp32 and bf16 caches; `kv_write` for any dtype.

Shapes: B rows · H query heads · Hkv key heads · D head dim · C slots of a row · N blocks · S slots of a block
M blocks of a row, at most · T tokens to store

The query heads that share a key head read it together; keys are split over threads where rows and key heads are fewer
than those. Sums are in fp32. Lengths, blocks and slots are checked before anything is read or written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _dispatch
from ..operators import define
from .library import DTYPES, QUANTIZED, dense_last, functions, pointer, strides


def refuses_tensors(**tensors: Tensor | None) -> str | None:
    """Why not: a tensor elsewhere than on the CPU, or others in another dtype than the first's."""
    (first, reference), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in ((first, reference), *others):
        if tensor.device.type != "cpu":
            return f"takes CPU tensors, and {name} is on {tensor.device}"
    for name, tensor in others:
        if tensor.is_floating_point() and name != "key_bias" and tensor.dtype != reference.dtype:
            return f"takes one dtype, and {first} is {reference.dtype}, {name} {tensor.dtype}"
    return None


def refuses_dtype(q: Tensor) -> str | None:
    return None if q.dtype in DTYPES else f"takes fp32 and bf16, not {q.dtype}"


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, kv_heads: int) -> None:
    """Raises ValueError where queries, keys and values do not go together."""
    if k.shape != v.shape:
        raise ValueError(f"{op}: k has shape {tuple(k.shape)}, and v {tuple(v.shape)}; takes the same")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{op}: q has a head dim of {q.shape[-1]}, and k of {k.shape[-1]}")
    if kv_heads == 0 or q.shape[1] % kv_heads:
        raise ValueError(f"{op}: {q.shape[1]} query heads cannot share {kv_heads} key heads evenly")


def check_paged(op: str, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor) -> None:
    """Raises ValueError where a paged cache, its table and queries do not go together."""
    if q.ndim != 3 or k_cache.ndim != 4:
        raise ValueError(
            f"{op} takes q [B, H, D] and k_cache [N, S, Hkv, D], not {q.ndim} and {k_cache.ndim} dimensions"
        )
    check_heads(op, q, k_cache, v_cache, k_cache.shape[2])
    if block_table.ndim != 2 or block_table.shape[0] != q.shape[0] or lengths.shape != q.shape[:1]:
        shapes = (q.shape[0], tuple(block_table.shape), tuple(lengths.shape))
        raise ValueError("{}: q has {} rows, block_table shape {}, lengths shape {}".format(op, *shapes))


def raise_for(op: str, status: int, what: str) -> None:
    """What a kernel returned: 0, -1 without memory, or 1 + the row whose numbers are out of range."""
    if status < 0:
        raise MemoryError(f"{op}: no memory for the partial sums")
    if status:
        raise ValueError(f"{op}: row {status - 1}: {what}")


# --- decode_attention ------------------------------------------------------------------------------------------------


def _refuses_dense(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, key_bias: Tensor | None = None) -> str | None:
    return refuses_dtype(q) or refuses_tensors(q=q, k=k, v=v, lengths=lengths, key_bias=key_bias)


@_dispatch.register("decode_attention", "cpu", refuses=_refuses_dense)
def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, key_bias: Tensor | None = None) -> Tensor:
    """Raises ValueError where shapes do not go together, or a length is negative or past the cache's slots."""
    if q.ndim != 3 or k.ndim != 4:
        raise ValueError(
            f"decode_attention takes q [B, H, D] and k [B, Hkv, C, D], not {q.ndim} and {k.ndim} dimensions"
        )
    check_heads("decode_attention", q, k, v, k.shape[1])
    if k.shape[0] != q.shape[0] or lengths.shape != q.shape[:1]:
        rows = (q.shape[0], k.shape[0], tuple(lengths.shape))
        raise ValueError("decode_attention: q has {} rows, k {}, and lengths shape {}".format(*rows))
    if key_bias is not None and key_bias.shape != k.shape[2:3]:
        raise ValueError(f"decode_attention: key_bias has shape {tuple(key_bias.shape)}, and k {k.shape[2]} slots")
    return cpu_decode_attention(q, k, v, lengths, key_bias)


@define(lambda q, *_: q.new_empty(q.shape), devices=("CPU",))
def cpu_decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, key_bias: Tensor | None) -> Tensor:
    q, k, v, lengths = q.contiguous(), dense_last(k), dense_last(v), lengths.to(torch.int32).contiguous()
    bias = None if key_bias is None else key_bias.float().contiguous()
    out = q.new_empty(q.shape)
    status = functions().decode_attention(
        *queries_of(q, k.shape[1]),
        *keys_of(k, v),
        k.shape[2],
        lengths.data_ptr(),
        pointer(bias),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    raise_for("decode_attention", status, f"its length must be from 0 to the cache's {k.shape[2]} slots")
    return out


# --- paged_decode_attention ------------------------------------------------------------------------------------------


def _refuses_paged(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor) -> str | None:
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "block_table": block_table, "lengths": lengths}
    return refuses_dtype(q) or refuses_tensors(**tensors)


@_dispatch.register("paged_decode_attention", "cpu", refuses=_refuses_paged)
def paged_decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    """Raises ValueError where shapes do not go together, or a length or a block that it needs is out of range."""
    check_paged("paged_decode_attention", q, k_cache, v_cache, block_table, lengths)
    return cpu_paged_decode_attention(q, k_cache, v_cache, block_table, lengths)


@define(lambda q, *_: q.new_empty(q.shape), devices=("CPU",))
def cpu_paged_decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor
) -> Tensor:
    return read_blocks("paged_decode_attention", q, dense_last(k_cache), dense_last(v_cache), block_table, lengths)


def read_blocks(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """The kernel over a plain cache, or one in 8 bits with its scales."""
    q = q.contiguous()
    block_table, lengths = (x.to(torch.int32).contiguous() for x in (block_table, lengths))
    out = q.new_empty(q.shape)
    blocks, slots, kv_heads, _ = k_cache.shape
    status = functions().paged_decode_attention(
        *queries_of(q, kv_heads),
        *keys_of(k_cache, v_cache),
        *stored(k_cache, k_scales, v_scales),
        blocks,
        slots,
        block_table.data_ptr(),
        block_table.shape[1],
        lengths.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    most = block_table.shape[1] * slots
    raise_for(op, status, f"its length must be from 0 to {most}, and its blocks from 0 to {blocks - 1}")
    return out


# --- kv_write --------------------------------------------------------------------------------------------------------


def _refuses_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> str | None:
    if why := refuses_tensors(k=k, v=v, k_cache=k_cache, v_cache=v_cache, slots=slots):
        return why
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        return "takes contiguous caches"
    return None


@_dispatch.register("kv_write", "cpu", refuses=_refuses_write)
def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Raises ValueError where shapes do not go together or a slot is past the cache; nothing is written then."""
    check_write("kv_write", k, v, k_cache, v_cache, slots)
    cpu_kv_write(k, v, k_cache, v_cache, slots)


@define(lambda k, v, k_cache, v_cache, slots: None, mutates=("k_cache", "v_cache"), devices=("CPU",))
def cpu_kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    k, v, slots = dense_last(k), dense_last(v), slots.to(torch.int64).contiguous()
    cache_slots = k_cache.shape[0] * k_cache.shape[1]
    status = functions().kv_write(
        *keys_of(k, v),
        k.itemsize,
        *k.shape,
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        cache_slots,
        slots.data_ptr(),
        torch.get_num_threads(),
    )
    raise_for_slot("kv_write", status, slots, cache_slots)


def check_write(op: str, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Raises ValueError where shapes do not go together."""
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if new.ndim != 3 or cache.ndim != 4 or new.shape[1:] != cache.shape[2:] or k_cache.shape[:2] != cache.shape[:2]:
            shapes = f"{tuple(new.shape)} and {tuple(cache.shape)}"
            takes = "[T, Hkv, D] and [N, S, Hkv, D], the same N and S for both"
            raise ValueError(f"{op}: {name} and its cache have shapes {shapes}; takes {takes}")
        if slots.shape != new.shape[:1]:
            raise ValueError(f"{op}: slots has shape {tuple(slots.shape)}, and {name} {new.shape[0]} tokens")


def raise_for_slot(op: str, status: int, slots: Tensor, cache_slots: int) -> None:
    if status:
        token = status - 1
        raise ValueError(f"{op}: slots[{token}] is {int(slots[token])}, and the cache has {cache_slots} slots")


# --- arguments in C's order ------------------------------------------------------------------------------------------


def queries_of(q: Tensor, kv_heads: int) -> tuple[int, ...]:
    rows, heads, dim = q.shape
    return q.data_ptr(), DTYPES[q.dtype], rows, heads, kv_heads, dim


def keys_of(k: Tensor, v: Tensor) -> tuple[object, ...]:
    return k.data_ptr(), strides(k), v.data_ptr(), strides(v)


def stored(cache: Tensor, k_scales: Tensor | None, v_scales: Tensor | None) -> tuple[int | None, ...]:
    return (DTYPES | QUANTIZED)[cache.dtype], pointer(k_scales), pointer(v_scales)
