"""`ops.decode_attention` and `ops.paged_decode_attention` by csrc/decode_attention.cu, `ops.kv_write` by kv_write.cu.

Shapes: B rows · T tokens · H query heads · Hkv key heads · D head dim · C slots of a row · N blocks
S slots of a block · M blocks of a row, at most · P splits of a row's keys
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._dispatch import register
from ..operators import define, multiprocessors
from .library import DTYPES, INT, INT64, POINTER, Launcher, empty_like, refused

_launch = Launcher("decode_attention", *[POINTER] * 8, *[INT64] * 19, INT, INT)
_launch_write = Launcher("kv_write", *[POINTER] * 5, *[INT64] * 8, INT, INT)

_MOST_DIM = 128
_LEAST_SPLIT, _MOST_SPLIT = 2**16, 2**21  # bytes of keys and values


# --- what is refused -------------------------------------------------------------------------------------------------


def refuses_heads(q: Tensor, kv_heads: int, dim: int, k: str) -> str | None:
    if q.shape[-1] != dim or not 0 < dim <= _MOST_DIM:
        return f"q has head dim {q.shape[-1]}, {k} {dim}; takes one, of {_MOST_DIM} at most"
    if not kv_heads or q.shape[1] % kv_heads:
        return f"q has {q.shape[1]} heads, {k} {kv_heads}; takes a multiple"
    return None


def refuses_beside(
    q: Tensor, name: str, x: Tensor, dtype: torch.dtype, shape: str, sizes: tuple[int, ...]
) -> str | None:
    """Why not x, whose dtype is not that of q: it must be `dtype`, its shape `sizes`, and its place where q is."""
    if x.dtype != dtype or x.shape != sizes:
        short = str(dtype).removeprefix("torch.")
        return f"{name} is {x.dtype} {list(x.shape)}; takes {short} {shape}, here {list(sizes)}"
    return None if x.device == q.device else f"{name} is on {x.device}; takes {q.device}, where q is"


def _refuses_decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, key_bias: Tensor | None = None) -> str | None:
    if q.ndim != 3 or k.ndim != 4 or k.shape[0] != q.shape[0]:
        return f"q has shape {list(q.shape)}, k {list(k.shape)}; takes [B, H, D] and [B, Hkv, C, D]"
    if v.shape != k.shape:
        return f"v has shape {list(v.shape)}, k {list(k.shape)}; takes one shape"
    if why := refuses_heads(q, k.shape[1], k.shape[3], "k") or refused(q=q, k=k, v=v):
        return why
    if why := refuses_beside(q, "lengths", lengths, torch.int32, "[B]", q.shape[:1]):
        return why
    return None if key_bias is None else refuses_beside(q, "key_bias", key_bias, torch.float32, "[C]", k.shape[2:3])


def _refuses_paged(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor) -> str | None:
    if q.ndim != 3 or k_cache.ndim != 4 or 0 in k_cache.shape[:2]:
        return f"q has shape {list(q.shape)}, k_cache {list(k_cache.shape)}; takes [B, H, D] and [N, S, Hkv, D], N > 0"
    if v_cache.shape != k_cache.shape:
        return f"v_cache has shape {list(v_cache.shape)}, k_cache {list(k_cache.shape)}; takes one shape"
    sizes = (q.shape[0], block_table.shape[-1] if block_table.ndim else 0)
    return (
        refuses_heads(q, k_cache.shape[2], k_cache.shape[3], "k_cache")
        or refused(q=q, k_cache=k_cache, v_cache=v_cache)
        or refuses_beside(q, "block_table", block_table, torch.int32, "[B, M]", sizes)
        or refuses_beside(q, "lengths", lengths, torch.int32, "[B]", q.shape[:1])
    )


def _refuses_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> str | None:
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if new.ndim != 3 or cache.ndim != 4 or new.shape[1:] != cache.shape[2:]:
            return (
                f"{name} has shape {list(new.shape)}, {name}_cache {list(cache.shape)};"
                " takes [T, Hkv, D] and [N, S, Hkv, D]"
            )
        if not cache.is_contiguous():
            return f"{name}_cache has strides {list(cache.stride())}; takes contiguous caches"
    if v.shape != k.shape or v_cache.shape != k_cache.shape:
        return f"v has shape {list(v.shape)}, k {list(k.shape)}; takes one shape, and caches of one shape"
    return (
        refused(k=k, v=v)
        or refused(k_cache=k_cache, v_cache=v_cache)
        or refuses_beside(k, "slots", slots, torch.int64, "[T]", k.shape[:1])
    )


# --- running ---------------------------------------------------------------------------------------------------------


def count_splits(pairs: int, group: int, capacity: int, key_bytes: int, at_once: int) -> int:
    """Splits of a row: as many as run side by side; or a few times that, so that no long row is left running alone.

    pairs: blocks without splits. group: query heads of a key head. key_bytes: of a key and a value. at_once:
    multiprocessors.
    """
    places = at_once * (3 if group <= 4 else 2)  # blocks of attend that registers leave room for
    wanted = max(places // pairs, min(capacity * key_bytes // _MOST_SPLIT, 4 * places // pairs))
    return max(1, min(wanted, capacity * key_bytes // _LEAST_SPLIT))


def unit_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def attend(
    q: Tensor,  # [B, H, T, D]
    k: Tensor,
    v: Tensor,
    k_steps: Sequence[int],  # between rows or blocks, heads, keys
    v_steps: Sequence[int],
    kv_heads: int,
    capacity: int,
    bounds: Tensor,  # lengths [B], or ranges [B, T, 2]
    table: Tensor | None = None,  # [B, M]
    slots: int = 1,  # of a block that the table names
    bias: Tensor | None = None,
) -> Tensor:
    """Launch csrc/decode_attention.cu → [B, T, H, D]. The last axes of q, k and v have a step of 1."""
    rows, heads, tokens, dim = q.shape
    group = heads // kv_heads
    out = q.new_empty((rows, tokens, heads, dim))
    if not out.numel():
        return out
    pairs = rows * tokens * kv_heads * -(-group // 8)
    splits = count_splits(pairs, group, capacity, 2 * dim * k.element_size(), multiprocessors(q.device))
    parts = None  # [B, T, H, P, D], and behind it [B, T, H, P]
    if splits > 1:
        parts = q.new_empty((rows * tokens * heads * splits * (dim + 1),), dtype=torch.float32)
    bounds = bounds.contiguous()
    _launch(
        q.device, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), None if parts is None else parts.data_ptr(),
        bounds.data_ptr(), None if table is None else table.data_ptr(), None if bias is None else bias.data_ptr(),
        rows, tokens, heads, kv_heads, dim, capacity, splits, k.shape[0], slots,
        0 if table is None else table.stride(0), q.stride(0), q.stride(1), q.stride(2), *k_steps, *v_steps,
        bounds.ndim == 3, DTYPES[q.dtype],
    )  # fmt: skip
    return out


# --- the ops ---------------------------------------------------------------------------------------------------------


@define(lambda q, *_: empty_like(q))
def cuda_decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, key_bias: Tensor | None) -> Tensor:
    q, k, v = unit_last(q), unit_last(k), unit_last(v)
    bias = None if key_bias is None else key_bias.contiguous()
    k_steps, v_steps = (x.stride()[:3] for x in (k, v))
    return attend(q[:, :, None], k, v, k_steps, v_steps, k.shape[1], k.shape[2], lengths, bias=bias)[:, 0]


@define(lambda q, *_: empty_like(q))
def cuda_paged_decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor
) -> Tensor:
    q, k, v, table = unit_last(q), unit_last(k_cache), unit_last(v_cache), unit_last(block_table)
    _, slots, kv_heads, _ = k.shape
    k_steps, v_steps = ((x.stride(0), x.stride(2), x.stride(1)) for x in (k, v))
    capacity = table.shape[1] * slots
    return attend(q[:, :, None], k, v, k_steps, v_steps, kv_heads, capacity, lengths, table, slots)[:, 0]


@define(lambda k, v, k_cache, v_cache, slots: None, mutates=("k_cache", "v_cache"))
def cuda_kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    if not k.numel() or not k_cache.numel():
        return
    k, v, slots = unit_last(k), unit_last(v), slots.contiguous()
    _launch_write(
        k.device, k.data_ptr(), v.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), slots.data_ptr(), *k.shape,
        k_cache.shape[0] * k_cache.shape[1], *k.stride()[:2], *v.stride()[:2], DTYPES[k.dtype], DTYPES[k_cache.dtype],
    )  # fmt: skip


@register("decode_attention", "cuda", refuses=_refuses_decode)
def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, key_bias: Tensor | None = None) -> Tensor:
    return cuda_decode_attention(q, k, v, lengths, key_bias)


@register("paged_decode_attention", "cuda", refuses=_refuses_paged)
def paged_decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    return cuda_paged_decode_attention(q, k_cache, v_cache, block_table, lengths)


@register("kv_write", "cuda", refuses=_refuses_write)
def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    cuda_kv_write(k, v, k_cache, v_cache, slots)
