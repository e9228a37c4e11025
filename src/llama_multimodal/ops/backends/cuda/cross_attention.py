"""`ops.cross_attention` for few text tokens, as in decoding, by csrc/decode_attention.cu.

Shapes: B rows · H query heads · Hkv key heads · T text tokens · S vision tokens in the batch · D head dim

Every token reads its keys for itself: with more tokens of the same range a matrix product would read them once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._dispatch import register
from ...cross_attention import KeyRanges
from ..operators import define
from .decode_attention import attend, refuses_beside, refuses_heads, unit_last
from .library import refused

_MOST_TOKENS = 8


def _refuses(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges) -> str | None:
    if q.ndim != 4 or k.ndim != 3:
        return f"q has shape {list(q.shape)}, k {list(k.shape)}; takes [B, H, T, D] and [Hkv, S, D]"
    if v.shape != k.shape:
        return f"v has shape {list(v.shape)}, k {list(k.shape)}; takes one shape"
    return (
        refuses_heads(q, k.shape[0], k.shape[2], "k")
        or refused(q=q, k=k, v=v)
        or refuses_beside(q, "ranges.table", ranges.table, torch.int32, "[B, T, 2]", (q.shape[0], q.shape[2], 2))
    )


def _empty(q: Tensor, *_: Tensor) -> Tensor:
    batch, heads, tokens, dim = q.shape
    return q.new_empty((batch, tokens, heads, dim)).transpose(1, 2)  # as the projection behind it reads it


@define(_empty)
def cuda_cross_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    q, k, v = unit_last(q), unit_last(k), unit_last(v)
    k_steps, v_steps = ((0, x.stride(0), x.stride(1)) for x in (k, v))
    return attend(q, k, v, k_steps, v_steps, k.shape[0], k.shape[1], table).transpose(1, 2)


@register("cross_attention", "cuda", refuses=_refuses, leaves=lambda q, *_: q.ndim == 4 and q.shape[2] > _MOST_TOKENS)
def cross_attention(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges) -> Tensor:
    return cuda_cross_attention(q, k, v, ranges.table)
