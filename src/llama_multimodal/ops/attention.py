"""Scaled dot-product attention for dense keys.

Shapes: B batch · H query heads · Hkv key heads · T queries · S keys · D head dim
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch
from .linear import widens

_WIDENED_AT_ONCE = 3 << 20  # values of q, k and v whose fp32 copies exist at a time, unless one head has more


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ / √D + bias) v, grouped-query where Hkv < H.

    q: [B, H, T, D]; k, v: [B, Hkv, S, D] → [B, H, T, D]

    causal: query t sees keys up to t (T = S).
    mask: bool [B or 1, 1, T, S], True where a query may look; or additive in q's dtype.
    key_bias: [S], fp32 or wider, added to every query's logits; -inf hides a key, log n counts it n times.
    """
    return _dispatch.call("attention", _torch, q, k, v, causal=causal, mask=mask, key_bias=key_bias)


def segment_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[Sequence[int]]) -> Tensor:
    """Causal attention in rows that hold several texts, each of which reads itself only; no [T, T] mask is made.

    q: [B, H, T, D]; k, v: [B, Hkv, T, D] → [B, H, T, D]. lengths: tokens of each row's texts, T together.
    """
    rows = []
    for row, cut in enumerate(lengths):
        texts = zip(*(x[row : row + 1].split(list(cut), dim=2) for x in (q, k, v)), strict=True)
        rows.append(torch.cat([attention(*text, causal=True) for text in texts], dim=2))
    return torch.cat(rows)


def _torch(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, key_bias: Tensor | None) -> Tensor:
    dtype, heads, kv_heads = q.dtype, q.shape[1], k.shape[1]
    if key_bias is not None or widens(q):
        # A bias of log n needs more digits than bf16 has; a CPU without bf16 arithmetic is faster in fp32 anyway.
        some = max(1, _WIDENED_AT_ONCE * kv_heads // max(1, q.numel() + k.numel() + v.numel()))  # key heads
        if some < kv_heads and dtype.itemsize < 4 and not torch.is_grad_enabled():
            out, group = torch.empty_like(q), heads // kv_heads
            for first in range(0, kv_heads, some):
                ours, theirs = slice(first * group, (first + some) * group), slice(first, first + some)
                out[:, ours] = _torch(
                    q[:, ours], k[:, theirs], v[:, theirs], causal=causal, mask=mask, key_bias=key_bias
                )
            return out
        q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    if key_bias is not None:
        bias = key_bias.to(q.dtype).expand(q.shape[0], 1, q.shape[2], k.shape[2])
        if mask is None:
            mask = bias
        else:
            mask = bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
    if q.shape[2] == 1 and heads != kv_heads and not causal:
        # One query a head: let the group's queries share a key head, which spares torch a slow path.
        grouped = q.view(q.shape[0], kv_heads, heads // kv_heads, q.shape[3])
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).view(q.shape).to(dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=heads != kv_heads).to(
        dtype
    )
