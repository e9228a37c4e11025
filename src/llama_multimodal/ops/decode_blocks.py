"""A decoder's self-attention blocks for one new token a row, with packed weights: one call in place of eleven a block.

Shapes: B rows · E hidden size · H query heads · Hkv key heads · D head dim · F feed-forward size · C slots of a row
N cache blocks · S slots of a cache block · M cache blocks of a row, at most
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    @property
    def products(self) -> tuple[PackedProduct, PackedProduct, PackedProduct, PackedProduct]:
        return self.qkv, self.output, self.gate_up, self.down

    @property
    def norms(self) -> tuple[Tensor, Tensor]:
        return self.input_norm, self.post_attention_norm


def decode_blocks(
    x: Tensor,
    blocks: Sequence[DecoderBlock],
    cos: Tensor,
    sin: Tensor,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    lengths: Tensor,
) -> Tensor:
    """The last block's output for x [B, E], one token a row at position lengths[b] - 1, whose keys and values are
    stored; each block reads the one before.

    cos, sin: fp32 [B, D/2], its angles in the half layout; k_caches, v_caches: one a block, [B, Hkv, C, D], written in
    place; lengths: int32 [B], 1 to C, the new token included → [B, E]
    """
    return _dispatch.call("decode_blocks", _torch, x, blocks, cos, sin, k_caches, v_caches, lengths)


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
    """`decode_blocks` over caches in blocks, as `paged_decode_attention` reads them: one a decoder block,
    [N, S, Hkv, D], all plain or all quantized; block_table: int32 [B, M]; lengths: int32 [B], 1 to M·S, the new token
    included."""
    return _dispatch.call("paged_decode_blocks", _paged, x, blocks, cos, sin, k_caches, v_caches, block_table, lengths)


def _torch(
    x: Tensor,
    blocks: Sequence[DecoderBlock],
    cos: Tensor,
    sin: Tensor,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    lengths: Tensor,
) -> Tensor:
    rows, slots = torch.arange(len(x), device=x.device), (lengths - 1).long().to(x.device)

    def attend(block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_cache, v_cache = k_caches[block], v_caches[block]
        k_cache[rows, :, slots], v_cache[rows, :, slots] = k, v
        return decode_attention(q, k_cache, v_cache, lengths)

    return _run(x, blocks, cos, sin, attend)


def _paged(
    x: Tensor,
    blocks: Sequence[DecoderBlock],
    cos: Tensor,
    sin: Tensor,
    k_caches: Sequence[CacheBlocks],
    v_caches: Sequence[CacheBlocks],
    block_table: Tensor,
    lengths: Tensor,
) -> Tensor:
    size, last = k_caches[0].shape[1], (lengths - 1).long()
    slots = block_table.long().gather(1, (last // size)[:, None])[:, 0] * size + last % size

    def attend(block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv_write(k, v, k_caches[block], v_caches[block], slots)
        return paged_decode_attention(q, k_caches[block], v_caches[block], block_table, lengths)

    return _run(x, blocks, cos, sin, attend)


def _run(
    x: Tensor,
    blocks: Sequence[DecoderBlock],
    cos: Tensor,
    sin: Tensor,
    attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """attend: stores a block's new keys and values [B, Hkv, D], and takes its queries [B, H, D] to what they read."""
    cos, sin = cos[:, None], sin[:, None]
    for i, block in enumerate(blocks):
        heads, kv_heads, dim = block.heads, block.kv_heads, block.head_dim
        joined = block.qkv(rms_norm(x, block.input_norm, block.eps)).unflatten(-1, (-1, dim))  # [B, H + 2·Hkv, D]
        q, k, v = joined.split((heads, kv_heads, kv_heads), dim=1)
        q, k = (part[:, :, 0] for part in apply_rope(q[:, :, None], k[:, :, None], cos, sin))
        attended = block.output(attend(i, q, k, v).flatten(1))
        normed, x = add_rms_norm(attended, x, block.post_attention_norm, block.eps)
        x = x + block.down(swiglu(block.gate_up(normed)))
    return x
