"""`kv_write` into caches in 8 bits: bit for bit what the reference writes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from backends.references import FLOATS, name_of, poisoned, randn
from llama_multimodal import ops
from llama_multimodal.ops import CACHE_DTYPES, QuantizedBlocks
from llama_multimodal.ops.quantized_blocks import LIMITS, quantize

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
each_format = pytest.mark.parametrize("format", CACHE_DTYPES)


def a_cache(blocks: int, slots: int, heads: int, dim: int, format: str, device: str) -> QuantizedBlocks:
    """Whose every value is 1, and every scale 7."""
    values = torch.ones(blocks, slots, heads, dim, device=device).to(CACHE_DTYPES[format])
    return QuantizedBlocks(values, torch.full((blocks, slots, heads), 7.0, device=device))


def as_bits(cache: QuantizedBlocks) -> tuple[Tensor, Tensor]:
    """[N · S, Hkv, D] and [N · S, Hkv]"""
    return cache.values.view(torch.int8).flatten(0, 1), cache.scales.view(torch.int32).flatten(0, 1)


def check(k: Tensor, v: Tensor, slots: Tensor, blocks: int, format: str) -> None:
    _, heads, dim = k.shape
    caches = [a_cache(blocks, 4, heads, dim, format, str(k.device)) for _ in range(2)]
    expected = [a_cache(blocks, 4, heads, dim, format, str(k.device)) for _ in range(2)]
    ops.kv_write(k, v, *caches, slots)
    kept = slots >= 0
    for cache, wanted, new in zip(caches, expected, (k, v)):
        values, scales = quantize(new[kept], CACHE_DTYPES[format])
        bits, scale_bits = as_bits(wanted)
        bits[slots[kept]], scale_bits[slots[kept]] = values.view(torch.int8), scales.view(torch.int32)
        for ours, theirs in zip(as_bits(cache), as_bits(wanted)):
            assert torch.equal(ours, theirs)


@each_dtype
@each_format
@pytest.mark.parametrize(("heads", "dim"), [(1, 1), (3, 5), (2, 64), (8, 80), (5, 256)])
def test_tokens_of_many_sizes(dtype: torch.dtype, format: str, heads: int, dim: int, device: str) -> None:
    tokens = 9
    sizes = 10 ** torch.linspace(-6, 4, tokens, device=device)[:, None, None]
    k = poisoned((randn(tokens, heads, dim, device=device) * sizes).to(dtype))
    v = randn(heads, tokens, dim, dtype=dtype, seed=1, device=device).transpose(0, 1)
    slots = torch.randperm(16, generator=torch.Generator().manual_seed(dim))[:tokens].to(device)
    slots[::4] = -1
    check(k, v, slots, 4, format)


@each_format
def test_each_value_and_what_lies_between(format: str, device: str) -> None:
    """Every value of the format, every middle of two neighbours, and what is next to those, where the scale is 1."""
    limit = LIMITS[CACHE_DTYPES[format]]
    every = torch.arange(-128, 128).to(torch.int8).view(CACHE_DTYPES[format]).float()
    every = every[every.abs() <= limit].unique()
    middles = (every[1:] + every[:-1]) / 2
    x = torch.cat([every, middles, *(torch.nextafter(middles, torch.full_like(middles, end)) for end in (-500, 500))])
    x = torch.nn.functional.pad(x, (0, -len(x) % 255)).view(-1, 1, 255)
    x = torch.nn.functional.pad(x, (1, 0), value=limit).to(device)
    check(x, -x, torch.arange(len(x), device=device), -(-len(x) // 4), format)


@each_format
def test_what_is_not_finite(format: str, device: str) -> None:
    """A head with such a value is NaN wherever it is read; zeros stay zeros."""
    x = randn(6, 2, 16, device=device)
    x[0, 0, 3], x[1, 1, 15], x[2, 0, 0] = math.nan, math.inf, -math.inf
    x[3], x[4, 1] = 0.0, torch.finfo(torch.float32).max
    x[5, 0] = torch.finfo(torch.float32).smallest_normal
    check(x, x.flip(0), torch.arange(6, device=device), 2, format)


def test_a_slot_that_the_cache_does_not_have(device: str) -> None:
    new, caches = randn(2, 1, 8, device=device), [a_cache(2, 4, 1, 8, "int8", device) for _ in range(2)]
    slots = torch.tensor([8, 1], device=device)
    if device == "cpu":
        with pytest.raises(IndexError, match="slots go up to 8; takes less than N · S = 8"):
            ops.kv_write(new, new, *caches, slots)
    else:
        ops.kv_write(new, new, *caches, slots)
        assert (caches[0].scales == 7).sum() == 7
