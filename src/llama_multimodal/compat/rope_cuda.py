"""The original's `rope_cuda`: rotary positions, through `ops.apply_rope` and so with a kernel where there is one.

Shapes: B batch · T tokens · H heads · D head dim · P positions of a table
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..errors import ConfigError


def apply_rope(x: Tensor, freqs: Tensor, position_ids: Tensor | None = None, *, interleaved: bool = False) -> Tensor:
    """Rotate queries or keys; x: [B, T, H, D] → the same shape and dtype.

    freqs: [D/2], radians a token; or a table of angles in radians, [P, D/2], a row for each position; or one of complex
        numbers of length 1 (Meta's `freqs_cis`)
    position_ids: [T] or [B, T]; None counts from 0
    interleaved: the pair of element 2i is 2i + 1, as in Meta's files, rather than i and i + D/2, as in Hugging Face's

    Raises:
        ConfigError: shapes that do not go together.
        IndexError: a position outside the table.
    """
    if x.ndim != 4 or x.shape[3] % 2:
        raise ConfigError(f"apply_rope: x must be [batch, seq, heads, even dim], not {list(x.shape)}")
    rows, tokens, _, dim = x.shape
    if freqs.ndim not in (1, 2) or freqs.shape[-1] != dim // 2:
        raise ConfigError(f"apply_rope: freqs must be [{dim // 2}] or [positions, {dim // 2}], not {list(freqs.shape)}")
    positions = torch.arange(tokens, device=x.device) if position_ids is None else position_ids.to(x.device)
    if positions.shape not in ((tokens,), (1, tokens), (rows, tokens)):
        raise ConfigError(f"apply_rope: position_ids must be [{rows}, {tokens}], not {list(positions.shape)}")
    positions = positions.expand(rows, tokens).contiguous()
    heads = x.transpose(1, 2)  # [B, H, T, D]
    if freqs.ndim == 1:
        cos, sin = ops.rope_angles(positions, freqs)
        return _rotated(heads, cos, sin, None, interleaved)
    cos, sin = (freqs.real, freqs.imag) if freqs.is_complex() else (freqs.cos(), freqs.sin())
    return _rotated(heads, cos, sin, positions, interleaved)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> Tensor:
    wide = torch.float64 if heads.dtype == torch.float64 else torch.float32
    cos, sin = (part.to(heads.device, wide).contiguous() for part in (cos, sin))
    none = heads[:, :0]  # the op rotates queries and keys in one go
    rotated, _ = ops.apply_rope(heads, none, cos, sin, positions, interleaved=interleaved)
    return rotated.transpose(1, 2)
