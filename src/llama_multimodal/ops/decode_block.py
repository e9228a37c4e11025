"""A decoder's self-attention block for one new token a row, with packed weights: one call in place of eleven.

Shapes: B rows · E hidden size · H query heads · Hkv key heads · D head dim · F feed-forward size · C slots of a row
N blocks · S slots of a block · M blocks of a row, at most
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _dispatch
from .decode_attention import decode_attention, kv_write, paged_decode_attention
from .packed_linear import PackedWeight, packed_linear
from .quantized_blocks import CacheBlocks
from .rms_norm import add_rms_norm, rms_norm
from .rope import apply_rope
from .swiglu import swiglu


@dataclass(frozen=True)
class PackedProduct:
    """The arguments of `packed_linear` besides x."""

    weight: PackedWeight
    bias: Tensor | None = None
    int8_activations: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.weight, self.bias, self.int8_activations)


@dataclass(frozen=True)
class DecoderBlock:
    """A pre-norm Llama block.

    qkv: [H·D + 2·Hkv·D, E] · output: [E, H·D] · gate_up: [2·F, E] · down: [E, F] · norms: [E]
    """

    qkv: PackedProduct
    output: PackedProduct
    gate_up: PackedProduct
    down: PackedProduct
    input_norm: Tensor
    post_attention_norm: Tensor
    eps: float
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.output.weight.shape[1] // self.heads


def decode_block(
    x: Tensor, block: DecoderBlock, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor
) -> Tensor:
    """The block's output for x [B, E], one token a row at position lengths[b] - 1, whose key and value are stored.

    cos, sin: fp32 [B, D/2], its angles in the half layout; k_cache, v_cache: [B, Hkv, C, D], written in place;
    lengths: int32 [B], 1 to C, the new token included → [B, E]
    """
    return _dispatch.call("decode_block", _torch, x, block, cos, sin, k_cache, v_cache, lengths)


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
    """`decode_block` over a cache in blocks, as `paged_decode_attention` reads it: k_cache, v_cache [N, S, Hkv, D],
    both plain or both quantized; block_table: int32 [B, M]; lengths: int32 [B], 1 to M·S, the new token included."""
    return _dispatch.call("paged_decode_block", _paged, x, block, cos, sin, k_cache, v_cache, block_table, lengths)


def _torch(
    x: Tensor, block: DecoderBlock, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor
) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, slots = torch.arange(len(x), device=x.device), (lengths - 1).long().to(x.device)
        k_cache[rows, :, slots], v_cache[rows, :, slots] = k, v
        return decode_attention(q, k_cache, v_cache, lengths)

    return _block(x, block, cos, sin, attend)


def _paged(
    x: Tensor,
    block: DecoderBlock,
    cos: Tensor,
    sin: Tensor,
    k_cache: CacheBlocks,
    v_cache: CacheBlocks,
    block_table: Tensor,
    lengths: Tensor,
) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size, last = k_cache.shape[1], (lengths - 1).long()
        blocks = block_table.long().gather(1, (last // size)[:, None])[:, 0]
        kv_write(k, v, k_cache, v_cache, blocks * size + last % size)
        return paged_decode_attention(q, k_cache, v_cache, block_table, lengths)

    return _block(x, block, cos, sin, attend)


def _block(
    x: Tensor, block: DecoderBlock, cos: Tensor, sin: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """attend: stores the new keys and values [B, Hkv, D], and takes queries [B, H, D] to what they read."""
    heads, kv_heads, dim = block.heads, block.kv_heads, block.head_dim
    joined = block.qkv(rms_norm(x, block.input_norm, block.eps)).unflatten(-1, (-1, dim))  # [B, H + 2·Hkv, D]
    q, k, v = joined.split((heads, kv_heads, kv_heads), dim=1)
    q, k = (part[:, :, 0] for part in apply_rope(q[:, :, None], k[:, :, None], cos[:, None], sin[:, None]))
    attended = block.output(attend(q, k, v).flatten(1))
    normed, x = add_rms_norm(attended, x, block.post_attention_norm, block.eps)
    return x + block.down(swiglu(block.gate_up(normed)))
