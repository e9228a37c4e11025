"""`decode_block` and `paged_decode_block` on CPUs: the block's products, and what lies between them, in one call.

Shapes: B rows · E hidden size · Hkv key heads · D head dim · C slots of a row · N blocks · S slots of a block
M blocks of a row, at most
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _dispatch
from ...decode_block import DecoderBlock
from ...quantized_blocks import CacheBlocks, QuantizedBlocks, refused_as_8_bits
from ..operators import define
from .decode_attention import raise_for, refuses_dtype, refuses_tensors, stored
from .library import DTYPES, functions, pointer, strides
from .packed_linear import LAYOUT, few_bf16_rows

_MOST_ROWS = 8
_PRODUCT = struct.Struct("@PPPPqqqii")  # LlamaMmProduct of csrc/decode_block.cpp
_BLOCK = struct.Struct("@PPfiqqq")  # LlamaMmBlock behind its four products


def _refuses_block(x: Tensor, block: DecoderBlock, cos: Tensor, sin: Tensor, **others: Tensor) -> str | None:
    """Why not, whatever shapes the caches have."""
    norms = {"input_norm": block.input_norm, "post_attention_norm": block.post_attention_norm}
    if why := refuses_dtype(x) or refuses_tensors(x=x, **others, **norms):
        return why
    most = _MOST_ROWS
    for product in (block.qkv, block.output, block.gate_up, block.down):
        weight, bias = product.weight, product.bias
        if weight.format == "bf16":
            most = min(most, few_bf16_rows())
        elif weight.layout != LAYOUT:
            return f'a weight has the layout "{weight.layout}"; takes "{LAYOUT}"'
        if not weight.values.is_cpu or (bias is not None and bias.dtype != x.dtype):
            return f"takes weights on the CPU with biases in {x.dtype}"
    if x.ndim != 2 or not 1 <= len(x) <= most:
        return f"x has shape {list(x.shape)}; takes [B, E] of {most} rows at most"
    if cos.shape != (len(x), block.head_dim // 2) or sin.shape != cos.shape or cos.dtype != torch.float32:
        return f"cos and sin have shapes {list(cos.shape)} and {list(sin.shape)}; takes fp32 [B, D/2]"
    return None


def _refuses_caches(k_cache: Tensor, v_cache: Tensor, shape: tuple[int, ...]) -> str | None:
    if k_cache.shape != shape or v_cache.shape != shape or k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        return f"the caches have shapes {list(k_cache.shape)} and {list(v_cache.shape)}; takes {list(shape)}, dense"
    return None


def _refuses(
    x: Tensor, block: DecoderBlock, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor
) -> str | None:
    if why := _refuses_block(x, block, cos, sin, k_cache=k_cache, v_cache=v_cache, lengths=lengths):
        return why
    return _refuses_caches(k_cache, v_cache, (len(x), block.kv_heads, k_cache.shape[2], block.head_dim))


def _refuses_paged(
    x: Tensor,
    block: DecoderBlock,
    cos: Tensor,
    sin: Tensor,
    k_cache: CacheBlocks,
    v_cache: CacheBlocks,
    block_table: Tensor,
    lengths: Tensor,
) -> str | None:
    k, v, *scales = _unwrapped(k_cache, v_cache)
    plain = {} if scales else {"k_cache": k, "v_cache": v}
    if why := _refuses_block(x, block, cos, sin, lengths=lengths, **plain):
        return why
    if scales and (why := refused_as_8_bits(k, v, scales[0], scales[1], x.device)):
        return why
    if block_table.ndim != 2 or len(block_table) != len(x) or not block_table.is_cpu:
        return f"block_table has shape {list(block_table.shape)}; takes [B, M] on the CPU"
    return _refuses_caches(k, v, (*k.shape[:2], block.kv_heads, block.head_dim))


def _unwrapped(k_cache: CacheBlocks, v_cache: CacheBlocks) -> tuple[Tensor, ...]:
    """Keys and values, and where they are in 8 bits their scales."""
    if isinstance(k_cache, QuantizedBlocks):
        assert isinstance(v_cache, QuantizedBlocks)
        return k_cache.values, v_cache.values, k_cache.scales, v_cache.scales
    assert isinstance(v_cache, Tensor)
    return k_cache, v_cache


@_dispatch.register("decode_block", "cpu", refuses=_refuses)
def decode_block(
    x: Tensor, block: DecoderBlock, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor
) -> Tensor:
    """Raises ValueError where a length is below 1 or past the cache's slots; the caches stay as they are then."""
    return _run(x, block, cos, sin, (k_cache, v_cache), None, lengths)


@_dispatch.register("paged_decode_block", "cpu", refuses=_refuses_paged)
def paged_decode_block(
    x: Tensor,
    block: DecoderBlock,
    cos: Tensor,
    sin: Tensor,
    k_cache: CacheBlocks,
    v_cache: CacheBlocks,
    block_table: Tensor,
    lengths: Tensor,
) -> Tensor:
    """Raises ValueError where a length or a block that it needs is out of range; the caches stay as they are then."""
    return _run(x, block, cos, sin, _unwrapped(k_cache, v_cache), block_table, lengths)


def _run(
    x: Tensor,
    block: DecoderBlock,
    cos: Tensor,
    sin: Tensor,
    caches: tuple[Tensor, ...],
    block_table: Tensor | None,
    lengths: Tensor,
) -> Tensor:
    tensors, numbers = flattened(block)
    k_cache, v_cache, k_scales, v_scales = (*caches, None, None)[:4]
    return cpu_decode_block(
        x, tensors, numbers, block.input_norm, block.post_attention_norm, block.eps, block.heads, block.kv_heads,
        cos, sin, k_cache, v_cache, k_scales, v_scales, block_table, lengths,
    )  # fmt: skip


def flattened(block: DecoderBlock) -> tuple[list[Tensor | None], list[int]]:
    """Of each product values, scales, zeros, bias; and inputs, outputs, group, if int4, if with int8 activations."""
    tensors: list[Tensor | None] = []
    numbers: list[int] = []
    for product in (block.qkv, block.output, block.gate_up, block.down):
        weight = product.weight
        tensors += (weight.values, weight.scales, weight.zeros, product.bias)
        outputs, inputs = weight.shape
        numbers += (inputs, outputs, weight.group, weight.format == "int4", product.int8_activations)
    return tensors, numbers


@define(lambda x, *_: torch.empty_like(x), mutates=("k_cache", "v_cache", "k_scales", "v_scales"), devices=("CPU",))
def cpu_decode_block(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    input_norm: Tensor,
    post_attention_norm: Tensor,
    eps: float,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    block_table: Tensor | None,
    lengths: Tensor,
) -> Tensor:
    """tensors, numbers: of `flattened`; block_table: where the caches are in blocks; scales: where in 8 bits."""
    x, cos, sin, lengths = x.contiguous(), cos.contiguous(), sin.contiguous(), lengths.to(torch.int32).contiguous()
    out = torch.empty_like(x)
    pointers = [pointer(tensor) or 0 for tensor in tensors]
    described = [
        _PRODUCT.pack(*pointers[4 * i : 4 * i + 4], *numbers[5 * i : 5 * i + 5]) for i in range(len(numbers) // 5)
    ]
    norms = (input_norm.contiguous(), post_attention_norm.contiguous())
    described.append(
        _BLOCK.pack(*(norm.data_ptr() for norm in norms), eps, DTYPES[x.dtype], heads, kv_heads, k_cache.shape[3])
    )
    first = (
        b"".join(described), x.data_ptr(), len(x), cos.data_ptr(), sin.data_ptr(),
        k_cache.data_ptr(), strides(k_cache), v_cache.data_ptr(), strides(v_cache),
    )  # fmt: skip
    last = lengths.data_ptr(), out.data_ptr(), torch.get_num_threads()
    if block_table is None:
        status = functions().decode_block(*first, k_cache.shape[2], *last)
        raise_for("decode_block", status, f"its length must be from 1 to the cache's {k_cache.shape[2]} slots")
        return out
    block_table = block_table.to(torch.int32).contiguous()
    blocks, slots, most = *k_cache.shape[:2], block_table.shape[1]
    kept = stored(k_cache, k_scales, v_scales)
    status = functions().paged_decode_block(*first, *kept, blocks, slots, block_table.data_ptr(), most, *last)
    wanted = f"its length must be from 1 to {most * slots}, and its blocks from 0 to {blocks - 1}"
    raise_for("paged_decode_block", status, wanted)
    return out
