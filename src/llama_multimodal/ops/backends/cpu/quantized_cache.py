"""`paged_decode_attention` and `kv_write` on CPUs over caches in 8 bits, which are read as they are.

Shapes: B rows · H query heads · Hkv key heads · D head dim · N blocks · S slots of a block · M blocks of a row
T tokens to store
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _dispatch
from ...quantized_blocks import refused_as_8_bits
from ..operators import define
from .decode_attention import (
    check_paged,
    check_write,
    keys_of,
    raise_for_slot,
    read_blocks,
    refuses_dtype,
    refuses_tensors,
    stored,
)
from .library import DTYPES, dense_last, functions

# --- paged_decode_attention ------------------------------------------------------------------------------------------


def _refuses_read(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    block_table: Tensor,
    lengths: Tensor,
) -> str | None:
    if why := refuses_dtype(q) or refuses_tensors(q=q, block_table=block_table, lengths=lengths):
        return why
    return refused_as_8_bits(k_cache, v_cache, k_scales, v_scales, q.device)


@_dispatch.register("quantized_paged_decode_attention", "cpu", refuses=_refuses_read)
def quantized_paged_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    block_table: Tensor,
    lengths: Tensor,
) -> Tensor:
    """Raises ValueError where shapes do not go together, or a length or a block that it needs is out of range."""
    check_paged("quantized_paged_decode_attention", q, k_cache, v_cache, block_table, lengths)
    return cpu_quantized_paged_decode_attention(q, k_cache, v_cache, k_scales, v_scales, block_table, lengths)


@define(lambda q, *_: q.new_empty(q.shape), devices=("CPU",))
def cpu_quantized_paged_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    block_table: Tensor,
    lengths: Tensor,
) -> Tensor:
    return read_blocks(
        "quantized_paged_decode_attention", q, k_cache, v_cache, block_table, lengths, k_scales, v_scales
    )


# --- kv_write --------------------------------------------------------------------------------------------------------


def _refuses_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scales: Tensor, v_scales: Tensor, slots: Tensor
) -> str | None:
    if why := refuses_dtype(k) or refuses_tensors(k=k, v=v, slots=slots):
        return why
    return refused_as_8_bits(k_cache, v_cache, k_scales, v_scales, k.device)


@_dispatch.register("quantized_kv_write", "cpu", refuses=_refuses_write)
def quantized_kv_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scales: Tensor, v_scales: Tensor, slots: Tensor
) -> None:
    """Raises ValueError where shapes do not go together or a slot is past the cache; nothing is written then."""
    check_write("quantized_kv_write", k, v, k_cache, v_cache, slots)
    cpu_quantized_kv_write(k, v, k_cache, v_cache, k_scales, v_scales, slots)


@define(lambda *_: None, mutates=("k_cache", "v_cache", "k_scales", "v_scales"), devices=("CPU",))
def cpu_quantized_kv_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scales: Tensor, v_scales: Tensor, slots: Tensor
) -> None:
    k, v, slots = dense_last(k), dense_last(v), slots.to(torch.int64).contiguous()
    cache_slots = k_cache.shape[0] * k_cache.shape[1]
    status = functions().quantized_kv_write(
        *keys_of(k, v),
        DTYPES[k.dtype],
        *k.shape,
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        *stored(k_cache, k_scales, v_scales),
        cache_slots,
        slots.data_ptr(),
        torch.get_num_threads(),
    )
    raise_for_slot("quantized_kv_write", status, slots, cache_slots)
