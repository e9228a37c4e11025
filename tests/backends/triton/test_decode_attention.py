"""Decode attention, dense and paged, and the cache's writes, against fp64 one head at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from backends.cases import some_lengths
from backends.references import FLOATS, close, decode_attention, name_of, poisoned, randn, unpaged
from llama_multimodal import ops
from llama_multimodal.ops import CACHE_DTYPES, QuantizedBlocks
from llama_multimodal.ops.backends.triton.decode_attention import count_splits
from llama_multimodal.ops.quantized_blocks import dequantize, quantize

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
each_format = pytest.mark.parametrize("format", CACHE_DTYPES)
SHAPES = [
    (1, 1, 1, 1, 4), (3, 4, 2, 9, 80), (4, 6, 2, 70, 64), (3, 3, 3, 65, 96), (1, 40, 2, 130, 128), (2, 5, 1, 20, 33),
    (2, 2, 1, 12, 256),
]  # fmt: skip
"""rows, query heads, key heads, slots, head dim"""


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "key bias"])
def test_decode_attention(dtype: torch.dtype, shape: tuple[int, ...], biased: bool, device: str) -> None:
    b, h, kv, c, d = shape
    q = randn(b, h, d, dtype=dtype, device=device)
    k = poisoned(randn(b, kv, c, d, dtype=dtype, seed=1, device=device))
    v = randn(b, c, kv, d, dtype=dtype, seed=2, device=device).transpose(1, 2)
    lengths = some_lengths(b, c, device)
    bias = None
    if biased:
        bias = torch.randint(1, 5000, (c,), generator=torch.Generator().manual_seed(c)).float().log().to(device)
        bias[c // 2] = -math.inf if c > 1 else 0
        lengths[lengths == c // 2 + 1] -= 1  # no row whose only key is hidden
    ours = ops.decode_attention(q, k, v, lengths, bias)
    close(ours, decode_attention(q, k, v, lengths, bias), dtype)
    assert not ours[lengths == 0].any()


@each_dtype
@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
def test_a_row_divided_among_programs(dtype: torch.dtype, paged: bool, device: str) -> None:
    """Lengths that leave splits full, partly filled and empty; the largest score lies in the last split."""
    slots = 1200 if device == "cpu" else 4000
    assert count_splits(5, slots, 64, 3) >= 2
    lengths = torch.tensor([slots, 0, 1, 130, 777], dtype=torch.int32, device=device)
    q, k = randn(5, 4, 16, dtype=dtype, device=device), randn(5, 1, slots, 16, dtype=dtype, seed=1, device=device)
    v = randn(5, 1, slots, 16, dtype=dtype, seed=2, device=device)
    k[:, :, -20:] *= 3
    expected = decode_attention(q, k, v, lengths)
    if paged:
        table = torch.arange(5 * slots // 8, dtype=torch.int32, device=device).view(5, -1)
        caches = (x.transpose(1, 2).reshape(-1, 8, 1, 16) for x in (k, v))
        close(ops.paged_decode_attention(q, *caches, table, lengths), expected, dtype)
    else:
        close(ops.decode_attention(q, k, v, lengths), expected, dtype)


def test_every_key_counts(device: str) -> None:
    """Equal scores: the result is the mean of the values, to the last key of the last split."""
    k = torch.zeros(1, 1, 1100, 16, device=device)
    v = torch.arange(1100.0, device=device)[:, None].expand(1, 1, 1100, 16)
    for n in (1, 63, 64, 65, 511, 512, 513, 1099, 1100):
        lengths = torch.tensor([n], dtype=torch.int32, device=device)
        out = ops.decode_attention(torch.ones(1, 2, 16, device=device), k, v.contiguous(), lengths)
        torch.testing.assert_close(out, torch.full_like(out, (n - 1) / 2))


def test_lengths_past_the_cache_stop_at_its_end(device: str) -> None:
    q, k = randn(1, 2, 16, device=device), randn(1, 1, 5, 16, seed=1, device=device)
    lengths = torch.tensor([99], dtype=torch.int32, device=device)
    close(ops.decode_attention(q, k, k, lengths), decode_attention(q, k, k, lengths.clamp(max=5)), torch.float32)


@each_dtype
@pytest.mark.parametrize("slots", [1, 4, 16])
@pytest.mark.parametrize("dim", [80, 128])
def test_paged_decode_attention_and_kv_write(dtype: torch.dtype, slots: int, dim: int, device: str) -> None:
    generator = torch.Generator().manual_seed(slots)
    lengths = torch.tensor([2 * slots + 1, slots, 0, 1], dtype=torch.int32, device=device)
    blocks = torch.randperm(9, generator=generator).to(torch.int32)
    junk = torch.tensor([99, -1], dtype=torch.int32)
    table = torch.stack(
        [blocks[:3], torch.cat((blocks[3:4], junk)), torch.cat((junk, junk[:1])), torch.cat((blocks[4:5], junk))]
    ).to(device)
    where = [
        int(table[row, p // slots]) * slots + p % slots if p < lengths[row] else -1
        for row in range(4)
        for p in range(2 * slots + 1)
    ]
    slot_of = torch.tensor(where, device=device)
    k = poisoned(randn(len(where), 2, dim, dtype=dtype, device=device))
    v = randn(2, len(where), dim, dtype=dtype, seed=1, device=device).transpose(0, 1)
    caches = [torch.full((9, slots, 2, dim), 7.0, dtype=dtype, device=device) for _ in range(2)]
    ops.kv_write(k, v, *caches, slot_of)
    for cache, new in zip(caches, (k, v)):
        expected = torch.full_like(cache, 7.0).view(-1, 2, dim)
        expected[slot_of[slot_of >= 0]] = new[slot_of >= 0]
        assert torch.equal(cache.view(-1, 2, dim), expected)
    q = randn(4, 6, dim, dtype=dtype, device=device)
    dense = [unpaged(cache, table, lengths) for cache in caches]
    ours = ops.paged_decode_attention(q, *caches, table, lengths)
    close(ours, decode_attention(q, *dense, lengths), dtype)
    assert not ours[2].any()


def test_a_cache_of_another_dtype(device: str) -> None:
    k, v = (randn(3, 2, 8, seed=seed, device=device) for seed in range(2))
    caches = [torch.zeros(2, 4, 2, 8, dtype=torch.float16, device=device) for _ in range(2)]
    ops.kv_write(k, v, *caches, torch.tensor([7, -1, 0], device=device))
    assert torch.equal(caches[0][1, 3], k[0].half()) and torch.equal(caches[1][0, 0], v[2].half())
    assert not caches[0][0, 1:].any()


def test_a_block_that_the_cache_does_not_have(device: str) -> None:
    q, cache = randn(2, 2, 16, device=device), randn(3, 4, 1, 16, seed=1, device=device)
    lengths = torch.tensor([5, 4], dtype=torch.int32, device=device)
    for wrong in (-1, 3):
        table = torch.tensor([[0, wrong], [2, wrong]], dtype=torch.int32, device=device)
        if device == "cpu":
            with pytest.raises(IndexError, match=f"block_table names block {wrong} of 3"):
                ops.paged_decode_attention(q, cache, cache, table, lengths)
        else:
            out = ops.paged_decode_attention(q, cache, cache, table, lengths)
            assert out[0].isnan().all() and out[1].isfinite().all()


def test_a_slot_that_the_cache_does_not_have(device: str) -> None:
    new, caches = randn(2, 1, 8, device=device), [torch.zeros(2, 4, 1, 8, device=device) for _ in range(2)]
    slots = torch.tensor([8, 1], device=device)
    if device == "cpu":
        with pytest.raises(IndexError, match="slots go up to 8; takes less than N · S = 8"):
            ops.kv_write(new, new, *caches, slots)
    else:
        ops.kv_write(new, new, *caches, slots)
        assert torch.equal(caches[0][0, 1], new[1]) and caches[0].count_nonzero() == 8


# --- caches in 8 bits ------------------------------------------------------------------------------------------------


def in_blocks(x: Tensor, table: Tensor, lengths: Tensor, slots: int, format: str) -> QuantizedBlocks:
    """Dense keys [B, Hkv, C, D] in 8 bits in the blocks of a table; whatever no row holds has a scale of NaN."""
    rows, heads, _, dim = x.shape
    count = int(table.max()) + 1
    values = torch.full((count, slots, heads, dim), 3.0, device=x.device).to(CACHE_DTYPES[format]).view(torch.int8)
    scales = torch.full((count, slots, heads), math.nan, device=x.device)
    for b in range(rows):
        for p in range(int(lengths[b])):
            new, scale = quantize(x[b, :, p], CACHE_DTYPES[format])
            at = int(table[b, p // slots]), p % slots
            values[at], scales[at] = new.view(torch.int8), scale
    return QuantizedBlocks(values.view(CACHE_DTYPES[format]), scales)


def restored(cache: QuantizedBlocks, table: Tensor, lengths: Tensor) -> Tensor:
    return unpaged(dequantize(cache.values, cache.scales, torch.float64), table, lengths)


@each_dtype
@each_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_over_a_cache_in_8_bits(dtype: torch.dtype, format: str, shape: tuple[int, ...], device: str) -> None:
    """Values a thousand times smaller than keys: scales too small for fp16."""
    b, h, kv, c, d = shape
    slots, lengths = 5, some_lengths(b, c, device)
    blocks = torch.randperm(b * -(-c // slots), generator=torch.Generator().manual_seed(c))
    table = blocks.view(b, -1).to(device, torch.int32)
    q = randn(b, h, d, dtype=dtype, device=device)
    k = in_blocks(randn(b, kv, c, d, seed=1, device=device), table, lengths, slots, format)
    v = in_blocks(randn(b, kv, c, d, seed=2, device=device) / 1024, table, lengths, slots, format)
    table[torch.arange(table.shape[1], device=device) * slots >= lengths[:, None]] = 99
    ours = ops.paged_decode_attention(q, k, v, table, lengths)
    expected = decode_attention(q, restored(k, table, lengths), restored(v, table, lengths), lengths)
    close(ours * 1024, expected * 1024, dtype)
    assert not ours[lengths == 0].any()


@each_dtype
@each_format
def test_a_row_in_8_bits_divided_among_programs(dtype: torch.dtype, format: str, device: str) -> None:
    count, lengths = 1200, torch.tensor([1200, 0, 777], dtype=torch.int32, device=device)
    assert count_splits(3, count, 64, 3) >= 2
    table = torch.arange(3 * count // 8, dtype=torch.int32, device=device).view(3, -1)
    k = randn(3, 1, count, 16, seed=1, device=device)
    k[:, :, -20:] *= 3
    caches = [in_blocks(x, table, lengths, 8, format) for x in (k, randn(3, 1, count, 16, seed=2, device=device))]
    q = randn(3, 4, 16, dtype=dtype, device=device)
    expected = decode_attention(q, *(restored(cache, table, lengths) for cache in caches), lengths)
    close(ops.paged_decode_attention(q, *caches, table, lengths), expected, dtype)


@each_dtype
@each_format
def test_each_of_the_256_values(dtype: torch.dtype, format: str, device: str) -> None:
    """A value that is read alone comes as it is, NaN among them; a key's shows in the weights."""
    every = torch.arange(-128, 128, device=device).to(torch.int8).view(CACHE_DTYPES[format])
    ones, table = torch.ones(1, 1, 1, device=device), torch.zeros(1, 1, dtype=torch.int32, device=device)
    cache, length = QuantizedBlocks(every.view(1, 1, 1, 256), ones), torch.tensor([1], device=device)
    zeros = QuantizedBlocks(torch.zeros_like(cache.values.view(torch.int8)).view(every.dtype), ones)
    q = torch.zeros(1, 1, 256, dtype=dtype, device=device)
    out = ops.paged_decode_attention(q, zeros, cache, table, length)
    torch.testing.assert_close(out.flatten(), every.to(dtype), rtol=0, atol=0, equal_nan=True)

    # Each of 256 heads asks for one of them; the other key is zeros, and so is its value.
    finite = torch.where(every.float().isfinite(), every.view(torch.int8), 0)
    one = torch.ones(256, device=device).to(every.dtype).view(torch.int8)
    k, v = (torch.stack((x, torch.zeros_like(x))).view(every.dtype).view(1, 2, 1, 256) for x in (finite, one))
    k, v = (QuantizedBlocks(x, ones.expand(1, 2, 1).contiguous()) for x in (k, v))
    q, lengths = torch.eye(256, dtype=dtype, device=device)[None] / 4, length + 1
    expected = decode_attention(q, restored(k, table, lengths), restored(v, table, lengths), lengths)
    close(ops.paged_decode_attention(q, k, v, table, lengths), expected, dtype)


@each_format
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1], ids=["key", "value"])
def test_what_is_not_finite_shows(format: str, value: float, place: int, device: str) -> None:
    x = [randn(1, 2, 40, 16, seed=seed, device=device) for seed in range(2)]
    x[place][0, 0, 7, 3] = value
    table, lengths = torch.arange(8, dtype=torch.int32, device=device)[None], torch.tensor([40], device=device)
    caches = [in_blocks(part, table, lengths, 5, format) for part in x]
    out = ops.paged_decode_attention(randn(1, 4, 16, device=device), *caches, table, lengths)
    assert out[0, :2].isnan().all() and out[0, 2:].isfinite().all()
