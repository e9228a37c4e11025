"""Caches in 8 bits on CPUs: what is stored bit for bit as the reference rounds it, what is read against fp64 over the
restored values.

Shapes: B rows · H query heads · Hkv key heads · D head dim · N blocks · S slots of a block
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.errors import DeviceError
from llama_multimodal.ops import CACHE_DTYPES, QuantizedBlocks
from llama_multimodal.ops.backends.cpu import quantized_cache
from llama_multimodal.ops.quantized_blocks import dequantize, quantize

from .. import references
from ..references import close, name_of, randn
from .conftest import Guards
from .test_decode_blocks import BLOCK, block_of, inputs_of, one, paged

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
each_format = pytest.mark.parametrize("format", CACHE_DTYPES)

# B, H, Hkv, D, S: groups of 1 to 8 heads, dims with and without a rest
SHAPES = [(1, 1, 1, 1, 1), (3, 4, 4, 16, 16), (3, 6, 3, 64, 5), (2, 6, 2, 80, 16), (3, 4, 1, 128, 64), (2, 8, 1, 7, 3)]


def quantized(x: Tensor, format: str, guards: Guards) -> QuantizedBlocks:
    return QuantizedBlocks(*map(guards.input, quantize(x, CACHE_DTYPES[format])))


def restored(cache: QuantizedBlocks) -> Tensor:
    return dequantize(cache.values, cache.scales, torch.float64)


def empty(format: str, *shape: int) -> QuantizedBlocks:
    return QuantizedBlocks(torch.zeros(shape, dtype=CACHE_DTYPES[format]), torch.zeros(shape[:-1]))


def same(ours: QuantizedBlocks, theirs: QuantizedBlocks) -> bool:
    bits = torch.equal(ours.values.view(torch.int8), theirs.values.view(torch.int8))
    return bits and torch.equal(ours.scales.view(torch.int32), theirs.scales.view(torch.int32))


@each_dtype
@each_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_read(
    instruction_set: str, threads: None, guards: Guards, dtype: torch.dtype, format: str, shape: tuple[int, ...]
) -> None:
    b, h, kv, d, slots = shape
    most = 400 if slots == 5 else 70  # the former in several parts
    blocks, lengths = -(-most // slots), torch.tensor([most, 0, 33][:b], dtype=torch.int32)
    count = b * blocks
    k, v = (quantized(randn(count, slots, kv, d, seed=seed) * 3, format, guards) for seed in (1, 2))
    table = guards.input(torch.randperm(count, generator=torch.Generator().manual_seed(0)).int().view(b, blocks))
    q = guards.input(randn(b, h, d, dtype=dtype))
    dense = (references.unpaged(restored(cache), table, lengths) for cache in (k, v))
    expected = references.decode_attention(q, *dense, lengths)
    ours = ops.paged_decode_attention(q, k, v, table, lengths)
    close(ours, expected, dtype, scale=3)
    assert (ours[lengths == 0] == 0).all()
    with ops.use_backend("torch"):
        close(ops.paged_decode_attention(q, k, v, table, lengths), expected, dtype, scale=3)


@each_format
def test_many_keys_of_one_row_in_parts(instruction_set: str, threads: None, guards: Guards, format: str) -> None:
    k, v = (quantized(randn(101, 16, 1, 32, seed=seed), format, guards) for seed in (1, 2))
    table, lengths = torch.arange(101, dtype=torch.int32)[None], torch.tensor([1601], dtype=torch.int32)
    q = randn(1, 2, 32)
    expected = references.decode_attention(
        q, *(references.unpaged(restored(x), table, lengths) for x in (k, v)), lengths
    )
    close(ops.paged_decode_attention(q, k, v, table, lengths), expected, torch.float32)


@each_dtype
@each_format
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_what_is_written_is_the_reference_bit_for_bit(
    cpu: None, guards: Guards, dtype: torch.dtype, format: str, size: float
) -> None:
    slots = torch.tensor([5, -1, 0, 11, 7])
    k, v = (randn(5, 2, 33, dtype=dtype, seed=seed) * size for seed in (1, 2))
    k[0, 0, 3] = 0
    k[2, 1] = 0  # a row of nothing
    k[3, 0] *= torch.linspace(0, 1, 33).to(dtype) ** 8  # of all magnitudes: subnormal ones too
    ours, theirs = ([empty(format, 4, 3, 2, 33) for _ in range(2)] for _ in range(2))
    ops.kv_write(guards.input(k), guards.input(v), *ours, slots)
    with ops.use_backend("torch"):
        ops.kv_write(k, v, *theirs, slots)
    assert all(map(same, ours, theirs))
    assert ours[1].values.view(torch.int8).any() and not ours[1].scales.view(12, 2)[1].any()


@each_format
def test_ties_go_to_even_and_every_value_of_the_format_stays(cpu: None, format: str) -> None:
    dtype = CACHE_DTYPES[format]
    every = torch.arange(-128, 128).to(torch.int8).view(dtype).float()
    every = every[every.isfinite() & (every.abs() <= (127 if format == "int8" else 448))].sort().values
    between = (every[1:] + every[:-1]) / 2
    x = torch.cat((every, between))[None, None]  # the largest is the limit: the scale is 1
    caches = [empty(format, 1, 1, 1, x.shape[-1]) for _ in range(2)]
    ops.kv_write(x, x, *caches, torch.tensor([0]))
    assert float(caches[0].scales) == 1
    back = restored(caches[0]).flatten()
    assert torch.equal(back[: len(every)], every.double())
    expected, _ = quantize(x, dtype)
    assert torch.equal(caches[0].values.view(torch.int8).flatten(), expected.view(torch.int8).flatten())


@each_format
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(cpu: None, format: str, value: float) -> None:
    for backend in ("cpu", "torch"):
        k = randn(2, 2, 16)
        k[1, 0, 3] = value
        caches = [empty(format, 1, 2, 2, 16) for _ in range(2)]
        with ops.use_backend(backend):
            ops.kv_write(k, k, *caches, torch.tensor([0, 1]))
            table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
            out = ops.paged_decode_attention(randn(1, 2, 16), *caches, table, lengths)
        assert out[0, 0].isnan().all() and out[0, 1].isfinite().all()


@each_dtype
@each_format
@pytest.mark.parametrize("formats", [("int4", "int8", "int8", "int4"), ("bf16",) * 4], ids=["ints", "bf16"])
def test_a_whole_block(
    instruction_set: str, guards: Guards, dtype: torch.dtype, format: str, formats: tuple[str, ...]
) -> None:
    block = block_of(guards, dtype, formats)  # type: ignore[arg-type]
    made, order = paged(inputs_of(block, 2, dtype))
    lengths = made["lengths"].tolist()
    outs, written = [], []
    for backend in ("cpu", "torch"):
        caches = {
            name: QuantizedBlocks(*quantize(made[name].nan_to_num(), CACHE_DTYPES[format]))
            for name in ("k_cache", "v_cache")
        }
        with ops.use_backend(backend):
            outs.append(ops.paged_decode_blocks(**one(block, made | caches)))
        flat = [restored(cache).view(-1, block.kv_heads, block.head_dim) for cache in caches.values()]
        written.append(torch.stack([x[order[row, n - 1]] for x in flat for row, n in enumerate(lengths)]))
    tolerance = 5e-2 if dtype == torch.bfloat16 or format == "fp8" else 1e-2  # a value may round to its neighbour
    torch.testing.assert_close(*outs, rtol=tolerance, atol=tolerance)
    limit = float(written[1].abs().max())
    torch.testing.assert_close(*written, rtol=0, atol=limit * (0.08 if format == "fp8" else 0.02))
    assert max(lengths) > BLOCK and written[0].count_nonzero() > 0.9 * written[0].numel()


@pytest.mark.parametrize("name", ["q", "k_scales", "v_cache", "gaps"])
def test_what_it_does_not_take(cpu: None, name: str) -> None:
    k, v = empty("int8", 2, 4, 2, 16), empty("int8", 2, 4, 2, 16)
    q, table, lengths = randn(1, 2, 16), torch.zeros(1, 2, dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    if name == "q":
        q = q.half()
    elif name == "k_scales":
        k = QuantizedBlocks(k.values, k.scales[:1])
    elif name == "v_cache":
        v = empty("fp8", 2, 4, 2, 16)
    else:
        k = QuantizedBlocks(k.values[..., ::2], k.scales)
    messages = {"q": "fp32 and bf16", "k_scales": "has scales", "v_cache": "the same for both", "gaps": "contiguous"}
    with pytest.raises(DeviceError, match=messages[name]):
        ops.paged_decode_attention(q, k, v, table, lengths)


def test_indices_out_of_range_write_and_read_nothing(cpu: None) -> None:
    k, v, q = empty("int8", 2, 4, 2, 16), empty("int8", 2, 4, 2, 16), randn(1, 2, 16)
    table, lengths = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([9], dtype=torch.int32)
    with pytest.raises(ValueError, match="row 0: its length must be from 0 to 8"):
        ops.paged_decode_attention(q, k, v, table, lengths)
    with pytest.raises(ValueError, match=r"slots\[1\] is 8, and the cache has 8 slots"):
        ops.kv_write(randn(2, 2, 16), randn(2, 2, 16), k, v, torch.tensor([1, 8]))
    assert not k.values.any()
    with pytest.raises(ValueError, match="takes"):
        ops.kv_write(randn(2, 2, 8), randn(2, 2, 8), k, v, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="the same N and S for both"):
        ops.kv_write(randn(1, 2, 16), randn(1, 2, 16), k, empty("int8", 1, 4, 2, 16), torch.tensor([6]))


def test_torch_knows_the_operators(attached: None) -> None:
    """opcheck compares by arithmetic that fp8 has none of."""
    k, v = (QuantizedBlocks(*quantize(randn(3, 4, 2, 16, seed=seed), torch.int8)) for seed in (1, 2))
    caches = (k.values, v.values, k.scales, v.scales)
    table, lengths = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    read = quantized_cache.cpu_quantized_paged_decode_attention
    torch.library.opcheck(read, (randn(1, 4, 16), *caches, table, lengths))
    new, slots = randn(2, 2, 16), torch.tensor([3, -1])
    torch.library.opcheck(quantized_cache.cpu_quantized_kv_write, (new, new, *caches, slots))


def test_other_backends_leave_it_to_the_reference(cpu: None) -> None:
    """Where there is no kernel for caches in 8 bits, not even a forced backend stands in the way."""
    available = ops.available()
    assert set(available["quantized_kv_write"]) == {"cpu"}
    assert set(available["quantized_paged_decode_attention"]) <= {"cpu", "triton"}
