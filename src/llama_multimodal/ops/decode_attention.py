"""Attention of one new token a row over what a cache holds: dense, or in blocks that a table names (Kwon et al. 2023).

Shapes: B rows · H query heads · Hkv key heads · D head dim · C slots of a row · N blocks · S slots of a block
M blocks of a row, at most · T tokens to store
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _dispatch
from .attention import attention
from .quantized_blocks import CacheBlocks, QuantizedBlocks, put_slots, take_blocks


def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, key_bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √D + bias) v over the first `lengths[b]` keys of row b, grouped-query where Hkv < H.

    q: [B, H, D]; k, v: [B, Hkv, C, D]; lengths: int32 [B], 0 to C → [B, H, D]; a row of length 0 gives zeros.
    key_bias: fp32 [C], added to every query's logits; log n counts a key n times.
    """
    return _dispatch.call("decode_attention", _decode, q, k, v, lengths, key_bias)


def paged_decode_attention(
    q: Tensor, k_cache: CacheBlocks, v_cache: CacheBlocks, block_table: Tensor, lengths: Tensor
) -> Tensor:
    """`decode_attention` over blocks: key p of row b lies in slot p % S of block `block_table[b, p // S]`.

    q: [B, H, D]; k_cache, v_cache: [N, S, Hkv, D], both plain or both quantized; block_table: int32 [B, M], entries
    past a row's length are not read; lengths: int32 [B], 0 to M·S → [B, H, D]
    """
    if isinstance(k_cache, QuantizedBlocks) and isinstance(v_cache, QuantizedBlocks):
        caches = (k_cache.values, v_cache.values, k_cache.scales, v_cache.scales)
        return _dispatch.call("quantized_paged_decode_attention", _quantized, q, *caches, block_table, lengths)
    return _dispatch.call("paged_decode_attention", _paged, q, k_cache, v_cache, block_table, lengths)


def kv_write(k: Tensor, v: Tensor, k_cache: CacheBlocks, v_cache: CacheBlocks, slots: Tensor) -> None:
    """Store tokens in a paged cache, in place; a negative slot drops its token (padding).

    k, v: [T, Hkv, D]; k_cache, v_cache: [N, S, Hkv, D], contiguous, both plain or both quantized; slots: int64 [T],
    block · S + place in it, no two equal unless negative
    """
    if isinstance(k_cache, QuantizedBlocks) and isinstance(v_cache, QuantizedBlocks):
        caches = (k_cache.values, v_cache.values, k_cache.scales, v_cache.scales)
        return _dispatch.call("quantized_kv_write", _quantized_write, k, v, *caches, slots)
    _dispatch.call("kv_write", _write, k, v, k_cache, v_cache, slots)


def _decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, key_bias: Tensor | None) -> Tensor:
    seen = torch.arange(k.shape[2], device=q.device) < lengths[:, None].to(q.device)  # [B, C]
    some = seen.any(1)
    mask = (seen | ~some[:, None])[:, None, None]  # a row without keys looks anywhere, and is cleared below
    out = attention(q[:, :, None], k, v, mask=mask, key_bias=key_bias)[:, :, 0]
    return out * some[:, None, None]


def _paged(q: Tensor, k_cache: CacheBlocks, v_cache: CacheBlocks, block_table: Tensor, lengths: Tensor) -> Tensor:
    slots = k_cache.shape[1]
    used = torch.arange(block_table.shape[1], device=q.device) * slots < lengths[:, None].to(q.device)
    blocks = block_table.long().masked_fill(~used, 0)  # entries past the length may be anything
    k, v = (take_blocks(cache, blocks, q.dtype).flatten(1, 2).transpose(1, 2) for cache in (k_cache, v_cache))
    return _decode(q, k, v, lengths, None)  # k, v: [B, Hkv, M·S, D]


def _quantized(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    block_table: Tensor,
    lengths: Tensor,
) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)  # what is restored is not rounded again
    caches = QuantizedBlocks(k_cache, k_scales), QuantizedBlocks(v_cache, v_scales)
    return _paged(q.to(wide), *caches, block_table, lengths).to(q.dtype)


def _write(k: Tensor, v: Tensor, k_cache: CacheBlocks, v_cache: CacheBlocks, slots: Tensor) -> None:
    if not len(slots):
        return
    # A mask's indices would have to be waited for, and no CUDA graph does so: a dropped token does once more what
    # the first kept one does, or nothing where none is kept.
    kept = slots >= 0
    first = kept.int().argmax(0, keepdim=True)  # an index without a dimension would be waited for, too
    slots = torch.where(kept, slots, slots[first])
    for new, cache in ((k, k_cache), (v, v_cache)):
        put_slots(cache, slots, torch.where(kept[:, None, None], new, new[first]), kept[first])


def _quantized_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scales: Tensor, v_scales: Tensor, slots: Tensor
) -> None:
    _write(k, v, QuantizedBlocks(k_cache, k_scales), QuantizedBlocks(v_cache, v_scales), slots)
