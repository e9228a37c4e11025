"""`cross_attention` on CPUs for a decode step: one text token a row, which reads its own range of vision tokens.

Shapes: B rows · H query heads · Hkv key heads · S vision tokens in the batch · D head dim
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _dispatch
from ...cross_attention import KeyRanges
from ..operators import define
from .decode_attention import check_heads, keys_of, queries_of, raise_for, refuses_dtype, refuses_tensors
from .library import dense_last, functions


def _refuses(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges) -> str | None:
    return refuses_dtype(q) or refuses_tensors(q=q, k=k, v=v, ranges=ranges.table)


@_dispatch.register("cross_attention", "cpu", refuses=_refuses, leaves=lambda q, *_: q.ndim == 4 and q.shape[2] != 1)
def cross_attention(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges) -> Tensor:
    """Raises ValueError where shapes do not go together, or a range reaches past the keys."""
    if q.ndim != 4 or k.ndim != 3:
        raise ValueError(
            f"cross_attention takes q [B, H, T, D] and k [Hkv, S, D], not {q.ndim} and {k.ndim} dimensions"
        )
    check_heads("cross_attention", q, k, v, k.shape[0])
    if ranges.table.shape != (q.shape[0], 1, 2):
        raise ValueError(
            f"cross_attention: ranges are for {tuple(ranges.table.shape[:2])} tokens, not {(q.shape[0], 1)}"
        )
    return cpu_cross_attention(q, k, v, ranges.table)


@define(lambda q, *_: q.new_empty(q.shape), devices=("CPU",))
def cpu_cross_attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> Tensor:
    q, k, v, ranges = q.contiguous(), dense_last(k), dense_last(v), ranges.to(torch.int32).contiguous()
    out = q.new_empty(q.shape)
    status = functions().cross_attention(
        *queries_of(q[:, :, 0], k.shape[0]),
        *keys_of(k, v),
        k.shape[1],
        ranges.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    raise_for("cross_attention", status, f"its range of keys must lie within the {k.shape[1]} there are")
    return out
