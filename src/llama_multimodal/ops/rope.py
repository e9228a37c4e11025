"""Rotary position embedding (Su et al. 2021) with Llama 3.1's frequency scaling.

Shapes: B batch · H heads · T tokens · D head dim · P positions in the table
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import RopeScaling
from . import _dispatch


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angular frequencies, radians a token, [D/2] fp32.

    Source: `apply_scaling` in Meta's `llama3/model.py`: long wavelengths are stretched by `factor`, short ones kept,
    and those between blended.
    """
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    if scaling is None:
        return frequencies
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


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys; the pair of element i is element i + D/2 (the "half" layout).

    q: [B, H, T, D], k: [B, Hkv, T, D], cos, sin: [B, T, D/2] → the same shapes and dtypes as q and k. The products
    are taken in fp32, as Meta's reference does it.
    """
    return _dispatch.choose("apply_rope", _torch)(q, k, cos, sin)


def _torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos[:, None], sin[:, None]  # one axis for the heads
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    first, second = wide.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
