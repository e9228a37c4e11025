"""Attention of a flat batch over a cache in blocks: rows of any number of new tokens lie one after the other along N.

Shapes: N tokens of the batch · R rows of one token · H query heads · Hkv key heads · D head dim · P blocks
S slots of a block · M blocks of a row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import attention
from .decode_attention import kv_write, paged_decode_attention
from .quantized_blocks import CacheBlocks, take_blocks

_MASKED_AT_ONCE = 1 << 23  # queries times keys of a mask: a long prompt's chunk is read by so many at a time


@dataclass(frozen=True)
class PagedRun:
    """Tokens [first, end) of the batch that read the first `length` keys of `blocks` (int64 [M]).

    causal: they are the last of these keys' own tokens, and each sees up to itself; otherwise each sees all.
    places: which of the M·S keys they read instead, int64 [length], where not every block is full.
    """

    first: int
    end: int
    blocks: Tensor
    length: int
    causal: bool
    places: Tensor | None = None


@dataclass(frozen=True)
class PagedReads:
    """What each token of a flat batch reads; one that is in neither part reads nothing.

    table: int32 [R, M] and lengths: int32 [R], as `paged_decode_attention` takes them, of the batch's first R tokens,
    each a row of its own. runs: of others; a row that is in one, too, reads what that says.
    """

    table: Tensor
    lengths: Tensor
    runs: tuple[PagedRun, ...]


@dataclass(frozen=True)
class PagedCache:
    """Keys and values of every layer in blocks, and what a flat batch does with them.

    slots: int64 [N], where its own keys and values go: block · S + place; None where nothing is written.
    """

    keys: Sequence[CacheBlocks]  # one a layer, [P, S, Hkv, D]
    values: Sequence[CacheBlocks]
    reads: PagedReads
    slots: Tensor | None = None

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k, v [1, Hkv, N, D] of the batch's tokens."""
        assert self.slots is not None
        kv_write(k[0].transpose(0, 1), v[0].transpose(0, 1), self.keys[layer], self.values[layer], self.slots)


def paged_attention(q: Tensor, k_cache: CacheBlocks, v_cache: CacheBlocks, reads: PagedReads) -> Tensor:
    """Each token's attention over what it reads; zeros where it reads nothing.

    q: [1, H, N, D]; k_cache, v_cache: [P, S, Hkv, D] → [1, H, N, D]
    """
    rows = reads.table.shape[0]
    if rows == q.shape[2] and not reads.runs:
        flat = q[0].transpose(0, 1)  # [N, H, D]
        return paged_decode_attention(flat, k_cache, v_cache, reads.table, reads.lengths).transpose(0, 1)[None]
    out = torch.zeros_like(q)
    if rows:
        flat = q[0, :, :rows].transpose(0, 1)
        out[0, :, :rows] = paged_decode_attention(flat, k_cache, v_cache, reads.table, reads.lengths).transpose(0, 1)
    for run in reads.runs:
        k, v = (_gather(cache, run, q.dtype) for cache in (k_cache, v_cache))
        out[:, :, run.first : run.end] = _attend(q[:, :, run.first : run.end], k, v, run.causal)
    return out


def _gather(cache: CacheBlocks, run: PagedRun, dtype: torch.dtype) -> Tensor:
    """A run's keys or values as they lie one after the other: [1, Hkv, length, D]."""
    keys = take_blocks(cache, run.blocks, dtype).flatten(0, 1)  # [M·S, Hkv, D]
    return (keys[: run.length] if run.places is None else keys[run.places]).transpose(0, 1)[None]


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    if not causal or queries == keys:
        return attention(q, k, v, causal=causal)
    before = keys - queries
    step = max(1, _MASKED_AT_ONCE // keys)
    places = torch.arange(keys, device=q.device)
    pieces = []
    for first in range(0, queries, step):
        end = min(first + step, queries)
        seen = before + end
        mask = places[:seen] <= places[before + first : seen, None]
        pieces.append(attention(q[:, :, first:end], k[:, :, :seen], v[:, :, :seen], mask=mask[None, None]))
    return torch.cat(pieces, dim=2)
