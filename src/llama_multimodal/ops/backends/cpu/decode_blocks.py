"""`decode_blocks` and `paged_decode_blocks` on CPUs: the blocks' products, and what lies between them, in one call.

Shapes: L decoder blocks · B rows · E hidden size · Hkv key heads · D head dim · C slots of a row · N cache blocks
S slots of a cache block · M cache blocks of a row, at most
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _dispatch
from ...decode_blocks import DecoderBlock
from ...quantized_blocks import CacheBlocks, QuantizedBlocks, refused_as_8_bits
from ..operators import define
from .decode_attention import raise_for, refuses_dtype, refuses_tensors
from .library import DTYPES, QUANTIZED, functions, strides
from .packed_linear import LAYOUT, most_rows


def _refuses_blocks(
    x: Tensor, blocks: Sequence[DecoderBlock], cos: Tensor, sin: Tensor, caches: Sequence[Tensor], lengths: Tensor
) -> str | None:
    """Why not, whatever shapes the caches have; caches: those that are not in 8 bits. What passes is safe in C."""
    if x.ndim != 2:
        return f"x has shape {list(x.shape)}; takes [B, E]"
    if why := refuses_dtype(x) or refuses_tensors(x=x, lengths=lengths):
        return why
    for cache in caches:
        if not cache.is_cpu or cache.dtype != x.dtype:
            return f"takes caches on the CPU in {x.dtype}, and one is {cache.dtype} on {cache.device}"
    most, first = sys.maxsize, blocks[0]
    for block in blocks:
        if (block.heads, block.kv_heads, block.eps) != (first.heads, first.kv_heads, first.eps):
            return "blocks differ in their heads or in eps"
        if why := _refuses_block(block, x):
            return why
        sizes = [(product.weight.format, x.dtype, product.weight.shape[1]) for product in block.products]
        most = min(most, *(most_rows(*size) for size in sizes))
    if not 1 <= len(x) <= most:
        return f"x has {len(x)} rows; takes from 1 to {most}"
    if lengths.shape != x.shape[:1]:
        return f"lengths has shape {list(lengths.shape)}; takes one for each of {len(x)} rows"
    for angle in (cos, sin):
        if angle.shape != (len(x), first.head_dim // 2) or angle.dtype != torch.float32 or not angle.is_cpu:
            return f"cos and sin have shapes {list(cos.shape)} and {list(sin.shape)}; takes fp32 [B, D/2] on the CPU"
    return None


def _refuses_block(block: DecoderBlock, x: Tensor) -> str | None:
    hidden, heads, kv_heads, dim = x.shape[1], block.heads, block.kv_heads, block.head_dim
    inner = block.down.weight.shape[1]
    wanted = ((heads + 2 * kv_heads) * dim, hidden), (hidden, heads * dim), (2 * inner, hidden), (hidden, inner)
    if tuple(product.weight.shape for product in block.products) != wanted or kv_heads < 1 or heads % kv_heads:
        return f"x has shape {list(x.shape)}, and a block's weights {[p.weight.shape for p in block.products]}"
    for norm in block.norms:
        if norm.dtype != x.dtype or not norm.is_cpu or norm.shape != x.shape[1:] or not norm.is_contiguous():
            return f"takes norms on the CPU in {x.dtype}, of {hidden} values without gaps"
    for product in block.products:
        weight, bias = product.weight, product.bias
        if weight.format != "bf16" and weight.layout != LAYOUT:
            return f'a weight has the layout "{weight.layout}"; takes "{LAYOUT}"'
        if not weight.values.is_cpu:
            return "takes weights on the CPU"
        if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous() or len(bias) != weight.shape[0]):
            return f"takes biases in {x.dtype}, as long as their weights"
    return None


def _refuses_caches(
    blocks: Sequence[DecoderBlock], k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], shape: tuple[int, ...]
) -> str | None:
    """shape: what each must have."""
    for caches in (k_caches, v_caches):
        steps, dtype = caches[0].stride(), caches[0].dtype
        for cache in caches:
            if cache.shape != shape or steps[3] != 1:
                return f"a cache has shape {list(cache.shape)} and strides {list(steps)}; takes {list(shape)}, dense"
            if cache.stride() != steps or cache.dtype != dtype:
                return "the caches differ in their strides or dtypes from block to block"
    return None


def _refuses_counts(blocks: Sequence[DecoderBlock], *caches: Sequence[object]) -> str | None:
    counts = [len(of_blocks) for of_blocks in caches]
    if not blocks:
        return "takes one block or more"
    return None if set(counts) == {len(blocks)} else f"there are {counts} caches; takes {len(blocks)} of each"


def _refuses(
    x: Tensor,
    blocks: Sequence[DecoderBlock],
    cos: Tensor,
    sin: Tensor,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    lengths: Tensor,
) -> str | None:
    if why := _refuses_counts(blocks, k_caches, v_caches):
        return why
    if why := _refuses_blocks(x, blocks, cos, sin, (*k_caches, *v_caches), lengths):
        return why
    first = blocks[0]
    return _refuses_caches(blocks, k_caches, v_caches, (len(x), first.kv_heads, k_caches[0].shape[2], first.head_dim))


def _refuses_paged(
    x: Tensor,
    blocks: Sequence[DecoderBlock],
    cos: Tensor,
    sin: Tensor,
    k_caches: Sequence[CacheBlocks],
    v_caches: Sequence[CacheBlocks],
    block_table: Tensor,
    lengths: Tensor,
) -> str | None:
    k, v, *scales = _unwrapped(k_caches, v_caches)
    if why := _refuses_counts(blocks, k, v, *scales):
        return why
    if why := _refuses_blocks(x, blocks, cos, sin, () if scales else (*k, *v), lengths):
        return why
    if scales:
        for k_cache, v_cache, k_scales, v_scales in zip(k, v, *scales, strict=True):
            if why := refused_as_8_bits(k_cache, v_cache, k_scales, v_scales, x.device):
                return why
    if block_table.ndim != 2 or len(block_table) != len(x) or not block_table.is_cpu:
        return f"block_table has shape {list(block_table.shape)}; takes [B, M] on the CPU"
    return _refuses_caches(blocks, k, v, (*k[0].shape[:2], blocks[0].kv_heads, blocks[0].head_dim))


def _unwrapped(k_caches: Sequence[CacheBlocks], v_caches: Sequence[CacheBlocks]) -> tuple[list[Tensor], ...]:
    """Keys and values of each block, and where they are in 8 bits their scales."""
    plain = [[cache for cache in caches if isinstance(cache, Tensor)] for caches in (k_caches, v_caches)]
    in_8_bits = [[cache for cache in caches if isinstance(cache, QuantizedBlocks)] for caches in (k_caches, v_caches)]
    if not any(in_8_bits):
        return tuple(plain)
    values = ([cache.values for cache in caches] for caches in in_8_bits)
    return *values, *([cache.scales for cache in caches] for caches in in_8_bits)


@_dispatch.register("decode_blocks", "cpu", refuses=_refuses)
def decode_blocks(
    x: Tensor,
    blocks: Sequence[DecoderBlock],
    cos: Tensor,
    sin: Tensor,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    lengths: Tensor,
) -> Tensor:
    """Raises ValueError where a length is below 1 or past the cache's slots; the caches stay as they are then."""
    return _run(x, blocks, cos, sin, (k_caches, v_caches), None, lengths)


@_dispatch.register("paged_decode_blocks", "cpu", refuses=_refuses_paged)
def paged_decode_blocks(
    x: Tensor,
    blocks: Sequence[DecoderBlock],
    cos: Tensor,
    sin: Tensor,
    k_caches: Sequence[CacheBlocks],
    v_caches: Sequence[CacheBlocks],
    block_table: Tensor,
    lengths: Tensor,
) -> Tensor:
    """Raises ValueError where a length or a block that it needs is out of range; the caches stay as they are then."""
    return _run(x, blocks, cos, sin, _unwrapped(k_caches, v_caches), block_table, lengths)


def _run(
    x: Tensor,
    blocks: Sequence[DecoderBlock],
    cos: Tensor,
    sin: Tensor,
    caches: tuple[Sequence[Tensor], ...],
    block_table: Tensor | None,
    lengths: Tensor,
) -> Tensor:
    tensors, numbers = flattened(blocks)
    k_caches, v_caches, k_scales, v_scales = (*caches, (), ())[:4]
    first = blocks[0]
    return cpu_decode_blocks(
        x, tensors, numbers, first.eps, first.heads, first.kv_heads,
        cos, sin, k_caches, v_caches, k_scales, v_scales, block_table, lengths,
    )  # fmt: skip


def flattened(blocks: Sequence[DecoderBlock]) -> tuple[list[Tensor | None], list[int]]:
    """Of each block the values, scales, zeros and bias of its products, and its norms; and of each product inputs,
    outputs, group, if int4, if with int8 activations."""
    tensors: list[Tensor | None] = []
    numbers: list[int] = []
    for block in blocks:
        for product in block.products:
            weight = product.weight
            tensors += (weight.values, weight.scales, weight.zeros, product.bias)
            outputs, inputs = weight.shape
            numbers += (inputs, outputs, weight.group, weight.format == "int4", product.int8_activations)
        tensors += block.norms
    return tensors, numbers


@define(lambda x, *_: torch.empty_like(x), mutates=("k_caches", "v_caches", "k_scales", "v_scales"), devices=("CPU",))
def cpu_decode_blocks(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: float,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    k_scales: Sequence[Tensor],
    v_scales: Sequence[Tensor],
    block_table: Tensor | None,
    lengths: Tensor,
) -> Tensor:
    """tensors, numbers: of `flattened`; block_table: where the caches are in blocks; scales: where in 8 bits."""
    x, cos, sin, lengths = x.contiguous(), cos.contiguous(), sin.contiguous(), lengths.to(torch.int32).contiguous()
    out = torch.empty_like(x)
    k_cache, v_cache, count = k_caches[0], v_caches[0], len(k_caches)
    blocks = _pointers(tensors), struct.pack(f"{len(numbers)}q", *numbers), count
    caches = [_pointers(of_blocks) for of_blocks in (k_caches, v_caches)]
    first = (
        *blocks, eps, DTYPES[x.dtype], heads, kv_heads, k_cache.shape[3], x.data_ptr(), len(x), cos.data_ptr(),
        sin.data_ptr(), caches[0], strides(k_cache), caches[1], strides(v_cache),
    )  # fmt: skip
    last = lengths.data_ptr(), out.data_ptr(), torch.get_num_threads()
    if block_table is None:
        status = functions().decode_blocks(*first, k_cache.shape[2], *last)
        raise_for("decode_blocks", status, f"its length must be from 1 to the cache's {k_cache.shape[2]} slots")
        return out
    block_table = block_table.to(torch.int32).contiguous()
    number, slots, most = *k_cache.shape[:2], block_table.shape[1]
    kept = (
        (DTYPES | QUANTIZED)[k_cache.dtype],
        *(_pointers(scales) if scales else None for scales in (k_scales, v_scales)),
    )
    status = functions().paged_decode_blocks(*first, *kept, number, slots, block_table.data_ptr(), most, *last)
    wanted = f"its length must be from 1 to {most * slots}, and its blocks from 0 to {number - 1}"
    raise_for("paged_decode_blocks", status, wanted)
    return out


def _pointers(tensors: Sequence[Tensor | None]) -> bytes:
    return struct.pack(f"{len(tensors)}P", *(0 if tensor is None else tensor.data_ptr() for tensor in tensors))
