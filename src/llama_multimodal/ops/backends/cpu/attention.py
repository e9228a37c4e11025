"""`attention` of many queries on CPUs, where torch's own reaches about half of what the processor can do.

Shapes: B batch · H query heads · Hkv key heads · T queries · S keys · D head dim
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _dispatch
from ..operators import define
from .decode_attention import check_heads, cpu_decode_attention, keys_of, raise_for
from .library import DTYPES, dense_last, functions, has_attention, pointer, strides

_LEAST_QUERIES = 16  # putting the keys in order is not worth it for fewer; one alone reads them as they lie


def _leaves(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, key_bias: Tensor | None = None
) -> bool:
    """Whether torch's own is used: for other dtypes, masks and few queries, and on other machines."""
    tensors = (q, k, v) if key_bias is None else (q, k, v, key_bias)
    return (
        any(x.device.type != "cpu" for x in tensors)
        or any(x.dtype != q.dtype for x in (k, v))
        or mask is not None
        or 1 < q.shape[2] < _LEAST_QUERIES
        or not q.numel() * k.numel()
        or not has_attention(q.dtype)
    )


@_dispatch.register("attention", "cpu", leaves=_leaves)
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, key_bias: Tensor | None = None
) -> Tensor:
    """Raises ValueError where shapes do not go together."""
    check_heads("attention", q, k, v, k.shape[1])
    if q.shape[0] != k.shape[0] or (causal and q.shape[2] != k.shape[2]):
        shapes = tuple(q.shape), tuple(k.shape)
        raise ValueError("attention: q has shape {} and k {}; causal takes as many queries as keys".format(*shapes))
    if key_bias is not None and key_bias.shape != k.shape[2:3]:
        raise ValueError(f"attention: key_bias has shape {tuple(key_bias.shape)}, and k {k.shape[2]} keys")
    if q.shape[2] == 1:
        lengths = torch.full(q.shape[:1], k.shape[2], dtype=torch.int32)
        return cpu_decode_attention(q[:, :, 0], k, v, lengths, key_bias)[:, :, None]
    return cpu_attention(q, k, v, causal, key_bias)


def _empty(q: Tensor) -> Tensor:
    """[B, H, T, D] whose heads lie side by side, as the layer after it reads them."""
    rows, heads, queries, dim = q.shape
    return q.new_empty(rows, queries, heads, dim).transpose(1, 2)


@define(lambda q, *_: _empty(q), devices=("CPU",))
def cpu_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, key_bias: Tensor | None) -> Tensor:
    q, k, v = dense_last(q), dense_last(k), dense_last(v)
    bias = None if key_bias is None else key_bias.float().contiguous()
    out = _empty(q)
    rows, heads, queries, dim = q.shape
    status = functions().attention(
        DTYPES[q.dtype],
        q.data_ptr(),
        strides(q),
        *keys_of(k, v),
        rows,
        heads,
        k.shape[1],
        queries,
        k.shape[2],
        dim,
        causal,
        pointer(bias),
        out.data_ptr(),
        strides(out),
        torch.get_num_threads(),
    )
    raise_for("attention", status, "")
    return out
