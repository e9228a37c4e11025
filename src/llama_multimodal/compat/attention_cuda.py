"""The original's `attention_cuda`: grouped-query attention with a cache, through `ops`; keys are never repeated.

Shapes: B batch · T new tokens · S keys in all · H query heads · Hkv key heads · D head dim · C capacity
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..cache import SelfAttentionCache
from ..errors import ConfigError
from ..models.layers import merge_heads, split_heads


@dataclass
class KVCache:
    """Keys and values of the tokens so far, for `gqa_forward`, which adds to it."""

    layer: SelfAttentionCache  # of one layer
    length: int = 0

    @classmethod
    def allocate(
        cls,
        batch: int,
        capacity: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """An empty one, for at most `capacity` tokens a row."""
        shape = (batch, n_kv_heads, capacity, head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return cls(SelfAttentionCache([keys], [values]))


def gqa_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    kv_cache: KVCache | None = None,
    n_heads: int = 32,
    n_kv_heads: int = 8,
    head_dim: int = 128,
) -> Tensor:
    """Attention of H query heads to Hkv key heads, `softmax(q kᵀ / √D + mask) v`; positions are already in q and k.

    q: [B, T, H, D] or [B, T, H·D]; k, v: [B, T, Hkv, D] or [B, T, Hkv·D] → the shape of q
    mask: bool, True where a query may look, or added to the logits; [T, S] or [B or 1, 1, T, S]. None: every query sees
        every key
    kv_cache: k and v are added to it, and the keys are all that it holds then

    Raises:
        ConfigError: shapes that do not go together, or a full cache.
    """
    if kv_cache is not None and not isinstance(kv_cache, KVCache):
        raise ConfigError(
            f"gqa_forward: kv_cache must be a KVCache, not {type(kv_cache).__name__}; see KVCache.allocate"
        )
    if n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ConfigError(f"gqa_forward: n_heads {n_heads} must be a multiple of n_kv_heads {n_kv_heads}")
    flat = q.ndim == 3
    q = _heads("q", q, n_heads, head_dim)  # [B, H, T, D]
    k, v = _heads("k", k, n_kv_heads, head_dim), _heads("v", v, n_kv_heads, head_dim)  # [B, Hkv, T, D]
    if not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[2] != v.shape[2]:
        shapes = ", ".join(f"{name} {list(x.transpose(1, 2).shape)}" for name, x in zip("qkv", (q, k, v)))
        raise ConfigError(f"gqa_forward: {shapes} do not go together")
    if kv_cache is not None:
        k, v = _extended(kv_cache, k, v)
    if mask is not None and mask.ndim == 2:
        mask = mask[None, None]
    wanted = (q.shape[2], k.shape[2])
    if mask is not None and (mask.ndim != 4 or mask.shape[1] != 1 or tuple(mask.shape[2:]) != wanted):
        raise ConfigError(f"gqa_forward: mask must be {list(wanted)} or [batch, 1, …], not {list(mask.shape)}")
    out = ops.attention(q, k, v, mask=mask)
    return merge_heads(out) if flat else out.transpose(1, 2)


def _heads(name: str, x: Tensor, heads: int, dim: int) -> Tensor:
    """[B, T, heads, D] or [B, T, heads·D] → [B, heads, T, D]"""
    if x.ndim == 3 and x.shape[2] == heads * dim:
        return split_heads(x, heads)
    if x.ndim == 4 and x.shape[2:] == (heads, dim):
        return x.transpose(1, 2)
    wanted = f"[batch, seq, {heads}, {dim}] or [batch, seq, {heads * dim}]"
    raise ConfigError(f"gqa_forward: {name} must be {wanted}, not {list(x.shape)}")


def _extended(cache: KVCache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The cache with these tokens behind its own."""
    rows, heads, tokens, dim = k.shape
    held, end = cache.layer.keys[0].shape, cache.length + tokens
    if (rows, heads, dim) != (held[0], held[1], held[3]):
        raise ConfigError(f"gqa_forward: the cache is for [batch, heads, dim] {[held[0], held[1], held[3]]}")
    if end > cache.layer.capacity:
        raise ConfigError(f"gqa_forward: the cache holds {cache.layer.capacity} tokens, and {end} are asked for")
    positions = torch.arange(cache.length, end, device=k.device).expand(rows, tokens)
    keys, values = cache.layer.write(0, k, v, positions)
    cache.length = end
    return keys[:, :, :end], values[:, :, :end]
