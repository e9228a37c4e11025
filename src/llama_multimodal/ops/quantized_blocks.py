"""Blocks of a paged cache in 8 bits: each token's key (value) of each head has a scale of its own.

x ≈ value · scale with scale = max |x| / limit, so that the largest magnitude of a head is kept: whole numbers up to 127
(int8), or floats of 4 bits of exponent and 3 of mantissa up to 448 (fp8, e4m3 of Micikevicius et al. 2022).

Shapes: P blocks · S slots of a block · Hkv key heads · D head dim
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CACHE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Names of the 8-bit formats, and how their values are stored."""

SCALE_BYTES = 4

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest magnitude of each format."""


@dataclass(frozen=True)
class QuantizedBlocks:
    """A layer's keys or values. values: int8 or float8_e4m3fn [P, S, Hkv, D]; scales: fp32 [P, S, Hkv]; contiguous."""

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


CacheBlocks = Tensor | QuantizedBlocks
"""A layer's keys or values in blocks, [P, S, Hkv, D]: in a model's own dtype, or in 8 bits."""


def refused_as_8_bits(
    k_cache: Tensor, v_cache: Tensor, k_scales: Tensor, v_scales: Tensor, device: torch.device
) -> str | None:
    """Why these are no caches that a kernel on `device` reads: another dtype, gaps, or scales of another shape."""
    if k_cache.dtype not in LIMITS or v_cache.dtype != k_cache.dtype:
        return f"k_cache is {k_cache.dtype}, v_cache {v_cache.dtype}; takes int8 or float8_e4m3fn, the same for both"
    for cache, scales in ((k_cache, k_scales), (v_cache, v_scales)):
        if scales.dtype != torch.float32 or scales.shape != cache.shape[:-1]:
            shapes = f"shape {tuple(cache.shape)} has scales {scales.dtype} {tuple(scales.shape)}"
            return f"a cache of {shapes}; takes fp32 [N, S, Hkv]"
        if not (cache.is_contiguous() and scales.is_contiguous()) or {cache.device, scales.device} != {device}:
            return f"takes contiguous caches on {device}"
    return None


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., D] to the nearest values of `dtype`, and their scales, fp32 [...]. What is not finite becomes NaN."""
    wide, limit = x.float(), LIMITS[dtype]
    # By a tensor: a GPU multiplies by the inverse of a plain number, which is rounded once more.
    scales = wide.abs().amax(-1) / wide.new_full((), limit)
    values = (wide / torch.where(scales > 0, scales, 1.0)[..., None]).nan_to_num(0.0).clamp(-limit, limit)
    return (values.round() if dtype == torch.int8 else values).to(dtype), scales


def dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """values [..., D] times their scales [...]."""
    wide = torch.promote_types(dtype, torch.float32)
    return (values.to(wide) * scales[..., None].to(wide)).to(dtype)


def take_blocks(cache: CacheBlocks, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Some blocks (int64, any shape) in `dtype`, as plain values: [*blocks, S, Hkv, D]."""
    if isinstance(cache, Tensor):
        return cache[blocks]
    bytes_ = cache.values.view(torch.int8)[blocks]  # torch indexes no fp8 on some devices
    return dequantize(bytes_.view(cache.values.dtype), cache.scales[blocks], dtype)


def put_blocks(cache: CacheBlocks, blocks: Tensor, x: Tensor) -> None:
    """Store x [n, S, Hkv, D] in whole blocks (int64 [n])."""
    for room, new in _parts(cache, x):
        room[blocks] = new


def put_slots(cache: CacheBlocks, slots: Tensor, x: Tensor, really: Tensor) -> None:
    """Store tokens x [T, Hkv, D] at `slots` (int64 [T], block · S + place) where `really` (bool [1]); equal slots have
    equal tokens."""
    for room, new in _parts(cache, x):
        flat = room.view(-1, *room.shape[2:])
        flat[slots] = torch.where(really, new, flat[slots])


def _parts(cache: CacheBlocks, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A cache's tensors, and what becomes of x in each."""
    if isinstance(cache, Tensor):
        return [(cache, x.to(cache.dtype))]
    values, scales = quantize(x, cache.values.dtype)
    return [(cache.values.view(torch.int8), values.view(torch.int8)), (cache.scales, scales)]
