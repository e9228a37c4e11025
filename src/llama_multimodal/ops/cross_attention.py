"""Ragged cross-attention: each text token reads a contiguous range of packed vision tokens.

Shapes: B rows · H query heads · Hkv key heads · T text tokens · S vision tokens in the batch · D head dim
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _dispatch
from .attention import attention


@dataclass(frozen=True)
class Span:
    """Text tokens [first, end) of one row that read vision tokens [key_first, key_end)."""

    row: int
    first: int
    end: int
    key_first: int
    key_end: int


@dataclass(frozen=True)
class KeyRanges:
    """What each text token reads, twice: as runs on the host, and as a tensor for kernels.

    spans: in order of row and token. table: int32 [B, T, 2], first and end of each token's keys, (0, 0) for none.
    """

    spans: tuple[Span, ...]
    table: Tensor

    @classmethod
    def of(cls, spans: Sequence[Span], rows: int, tokens: int, device: torch.device | str = "cpu") -> KeyRanges:
        table = torch.zeros(rows, tokens, 2, dtype=torch.int32)
        for span in spans:
            table[span.row, span.first : span.end] = torch.tensor((span.key_first, span.key_end), dtype=torch.int32)
        return cls(tuple(spans), table.to(device, non_blocking=True))


def cross_attention(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges) -> Tensor:
    """Attention over each token's own range of keys, without a mask; tokens that read nothing get zeros.

    q: [B, H, T, D]; k, v: [Hkv, S, D] → [B, H, T, D]
    """
    return _dispatch.call("cross_attention", _torch, q, k, v, ranges)


def _torch(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges) -> Tensor:
    rows = [[] for _ in range(q.shape[0])]  # type: list[list[Tensor]]
    filled = [0] * q.shape[0]
    for span in ranges.spans:
        _pad(rows[span.row], q, span.row, filled[span.row], span.first)
        keys = slice(span.key_first, span.key_end)
        queries = q[span.row : span.row + 1, :, span.first : span.end]
        rows[span.row].append(attention(queries, k[None, :, keys], v[None, :, keys]))
        filled[span.row] = span.end
    for row, pieces in enumerate(rows):
        _pad(pieces, q, row, filled[row], q.shape[2])
    return torch.cat([torch.cat(pieces, dim=2) for pieces in rows])


def _pad(pieces: list[Tensor], q: Tensor, row: int, first: int, end: int) -> None:
    if end > first:
        pieces.append(torch.zeros_like(q[row : row + 1, :, first:end]))
