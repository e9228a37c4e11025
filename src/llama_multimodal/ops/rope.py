"""Rotary position embedding (Su et al. 2021) with Llama 3.1's frequency scaling.

Shapes: B batch · H heads · T tokens · D head dim · P positions in the table
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import LinearRopeScaling, RopeScaling
from . import _dispatch


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | LinearRopeScaling | None) -> Tensor:
    """Angular frequencies, radians a token, [D/2] fp32.

    Source: `apply_scaling` in Meta's `llama3/model.py`: long wavelengths are stretched by `factor`, short ones kept,
    and those between blended. Linear scaling stretches all alike.
    """
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearRopeScaling):
        return frequencies / scaling.factor
    wavelength = 2 * math.pi / frequencies
    longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
    shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
    blend = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    scaled = torch.where(wavelength > longest, frequencies / scaling.factor, blended)
    return torch.where(wavelength < shortest, frequencies, scaled)


def rope_angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle: positions [B, T], frequencies [D/2] → two of [B, T, D/2] fp32."""
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def apply_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, both in one go.

    q: [B, H, T, D], k: [B, Hkv, T, D] → the same shapes and dtypes. cos, sin: fp32 (fp64 for q in fp64), the angles of
    each token, [B, T, D/2]; or a table [P, D/2] with positions: [B, T], int64, the table's row for each token.

    interleaved: the pair of element 2i is 2i + 1, as in Meta's files; otherwise that of i is i + D/2 ("half", as in
    Hugging Face files). The products are taken in fp32, as Meta's reference does it.

    Raises:
        IndexError: a position outside the table (checked on the CPU; a GPU kernel does not wait to look).
    """
    return _dispatch.call("apply_rope", _torch, q, k, cos, sin, positions, interleaved=interleaved)


def _torch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos[:, None], sin[:, None]  # one axis for the heads
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    first, second = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return joined.to(x.dtype)
