"""Decode attention, dense and paged, and kv_write in CUDA C++ against fp64.

Shapes: B rows · H query heads · Hkv key heads · D head dim · C slots of a row · N blocks · S slots of a block
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.errors import DeviceError
from llama_multimodal.ops.backends.cuda.decode_attention import count_splits

from .. import references
from ..references import FLOATS, close, name_of, randn
from .conftest import Guards

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 4, 4, 64, 70),
    (2, 3, 1, 80, 33),
    (2, 8, 2, 96, 40),
    (3, 8, 1, 128, 37),
    (2, 12, 1, 128, 9),
    (2, 6, 2, 16, 150),
    (2, 10, 1, 33, 20),
]
"""B, H, Hkv, D, C: groups of 1 to 12 heads; all kernels, and a head dim that no vector divides"""


def caches(b: int, kv: int, c: int, d: int, dtype: torch.dtype, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Hkv, C, D] as a model's cache has them: a view of more slots, NaN past each row's length."""
    k, v = (randn(b, c + 3, kv, d, dtype=dtype, seed=seed).transpose(1, 2)[:, :, :c] for seed in (1, 2))
    for row, n in enumerate(lengths.tolist()):
        k[row, :, n:], v[row, :, n:] = math.nan, math.nan
    return k, v


def some_lengths(rows: int, slots: int) -> Tensor:
    return torch.tensor([slots, 0, slots // 2 + 1][:rows], dtype=torch.int32)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# --- dense -----------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_attention(dtype: torch.dtype, shape: tuple[int, ...], order: None, guards: Guards) -> None:
    b, h, kv, d, c = shape
    lengths = guards.input(some_lengths(b, c))
    q, (k, v) = guards.input(randn(b, h, d, dtype=dtype)), map(guards.input, caches(b, kv, c, d, dtype, lengths))
    bias = guards.input(torch.randint(1, 5000, (c,), generator=torch.Generator().manual_seed(c)).float().log())
    ours = ops.decode_attention(q, k, v, lengths)
    close(ours, references.decode_attention(q, k, v, lengths), dtype)
    assert not ours[lengths == 0].any()
    close(ops.decode_attention(q, k, v, lengths, bias), references.decode_attention(q, k, v, lengths, bias), dtype)


@each_dtype
@pytest.mark.parametrize("h, d", [(2, 128), (8, 128), (4, 64), (5, 100)])
def test_a_row_in_splits(dtype: torch.dtype, h: int, d: int, order: None, guards: Guards) -> None:
    """Splits that are full, partly filled and empty; one whose keys are all hidden; the largest logit in the last."""
    c = 700 if d * dtype.itemsize > 128 else 1100
    assert count_splits(1, h, c, 2 * d * dtype.itemsize, 3) >= 2
    lengths = int32(c)
    q, (k, v) = guards.input(randn(1, h, d, dtype=dtype)), caches(1, 1, c, d, dtype, lengths)
    k[:, :, -20:] *= 3
    k, v, bias = guards.input(k), guards.input(v), randn(c, seed=3)
    bias[: c // 2] = -math.inf
    bias = guards.input(bias)
    for n in (c, 0, 1, c // 2 + 1, c - 21):
        lengths = int32(n)
        close(ops.decode_attention(q, k, v, lengths), references.decode_attention(q, k, v, lengths), dtype)
    for n in (c, c // 2 + 3):
        lengths = int32(n)
        close(ops.decode_attention(q, k, v, lengths, bias), references.decode_attention(q, k, v, lengths, bias), dtype)
    assert not ops.decode_attention(q, k, v, int32(c // 3), bias).any()


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("group", [1, 4, 8])
def test_every_key_counts(group: int) -> None:
    """Equal logits: the result is the mean of the values, to the last key of the last split."""
    k = torch.zeros(1, 1, 520, 64)
    v = torch.arange(520.0)[:, None].expand(1, 1, 520, 64).contiguous()
    for n in (1, 2, 15, 16, 17, 31, 63, 64, 65, 255, 257, 519, 520):
        out = ops.decode_attention(torch.ones(1, group, 64), k, v, int32(n))
        torch.testing.assert_close(out, torch.full_like(out, (n - 1) / 2))


@pytest.mark.usefixtures("cuda")
def test_logits_of_any_size() -> None:
    """Largest key first or last, growing slowly or at once; log n counts a key n times."""
    k, v = randn(1, 1, 100, 64, seed=1), randn(1, 1, 100, 64, seed=2)
    k = k * torch.linspace(0, 1, 100)[:, None]
    for scale in (0.0, 1.0, 200.0, -200.0):
        q = scale * k[:, 0, -1:].expand(1, 2, 64)
        for keys in (k, k.flip(2)):
            expected = references.decode_attention(q, keys, v, int32(100))
            close(ops.decode_attention(q, keys, v, int32(100)), expected, torch.float32)
    counts = torch.randint(1, 9, (100,), generator=torch.Generator().manual_seed(0))
    many_k, many_v = (x.repeat_interleave(counts, dim=2) for x in (k, v))
    q, repeated = randn(1, 2, 64), int32(int(counts.sum()))
    expected = references.decode_attention(q, many_k, many_v, repeated)
    close(ops.decode_attention(q, k, v, int32(100), counts.float().log()), expected, torch.float32)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("slots", [40, 700])
def test_nan_shows(where: str, slots: int) -> None:
    given = {"q": randn(2, 1, 128), "k": randn(2, 1, slots, 128, seed=1), "v": randn(2, 1, slots, 128, seed=2)}
    for row in (0, 1):
        spoilt = given | {where: given[where].clone()}
        spoilt[where][row].view(-1)[5] = math.nan
        ours = ops.decode_attention(**spoilt, lengths=int32(slots, 1))
        assert ours[row].isnan().any() and ours[1 - row].isfinite().all()


@pytest.mark.usefixtures("cuda")
def test_lengths_past_the_cache_stop_at_its_end() -> None:
    q, k = randn(2, 2, 16), randn(2, 1, 5, 16, seed=1)
    expected = references.decode_attention(q, k, k, int32(5, 0))
    close(ops.decode_attention(q, k, k, int32(99, -3)), expected, torch.float32)


@pytest.mark.usefixtures("cuda")
@each_dtype
@pytest.mark.parametrize("d", [64, 128])
def test_any_place_in_memory(dtype: torch.dtype, d: int, guards: Guards) -> None:
    """Queries of one packed product; keys apart, overlapping, transposed, and not aligned."""
    packed = guards.input(randn(2, 3, 5 * d, dtype=dtype))[:, 1].unflatten(1, (5, d))
    apart = guards.input(randn(2, 4, d, 2, dtype=dtype))[..., 1]
    wide = guards.input(randn(2, 2, 9, 2 * d, dtype=dtype, seed=1))
    shifted = guards.input(randn(2, 2, 9, d, dtype=dtype, seed=2), offset=1)
    bias, lengths = randn(9, 2)[:, 1], int32(9, 0, 4, 0)[::2]
    for q in (packed[:, :4], apart):
        for k in (wide[..., ::2], wide[..., :d], wide.transpose(0, 1)[..., d:], wide[:1, ..., :d].expand(2, 2, 9, d)):
            for v in (k, shifted):
                expected = references.decode_attention(q, k, v, lengths, bias)
                close(ops.decode_attention(q, k, v, lengths, bias), expected, dtype)


@pytest.mark.usefixtures("cuda")
def test_steps_past_32_bits() -> None:
    """Rows and pages 2³¹ elements apart, in memory of which only they are ever touched."""
    far = torch.empty(2**31 + 2**10, dtype=torch.float16).as_strided((2, 2, 5, 64), (2**31, 320, 64, 1))
    far.copy_(randn(2, 2, 5, 64))
    q, lengths = randn(2, 4, 64, dtype=torch.float16), int32(5, 3)
    near = far.clone()
    assert torch.equal(ops.decode_attention(q, far, near, lengths), ops.decode_attention(q, near, far, lengths))
    pages, near = (x.transpose(1, 2) for x in (far, near))  # [N, S, Hkv, D]
    table = int32(1, 0).view(2, 1)
    ours = ops.paged_decode_attention(q, pages, near, table, lengths)
    assert torch.equal(ours, ops.paged_decode_attention(q, near, pages, table, lengths))


@pytest.mark.usefixtures("cuda")
def test_nothing_to_do() -> None:
    assert ops.decode_attention(randn(0, 2, 16), randn(0, 1, 5, 16), randn(0, 1, 5, 16), int32()).shape == (0, 2, 16)
    none = randn(2, 1, 0, 16)
    assert not ops.decode_attention(randn(2, 2, 16), none, none, int32(0, 0)).any()
    cache, table = randn(3, 4, 1, 16), torch.zeros(2, 0, dtype=torch.int32)
    assert not ops.paged_decode_attention(randn(2, 2, 16), cache, cache, table, int32(0, 0)).any()
    ops.kv_write(randn(0, 1, 16), randn(0, 1, 16), cache, cache, torch.zeros(0, dtype=torch.int64))


def test_splits() -> None:
    """Enough blocks to fill a device; none with too little to do, none with so much that others wait for it."""
    kib = 2 * 128 * 2 * 2  # of a key and value in bf16, twice
    for pairs in (1, 8, 50, 400, 5000):
        for group in (1, 4, 8):
            for capacity in (1, 100, 4096, 131072):
                splits = count_splits(pairs, group, capacity, kib, 132)
                assert 1 <= splits <= max(1, capacity // 64)
                assert pairs * splits <= 4 * 3 * 132 or splits == 1
                if capacity // 64 * pairs >= 3 * 132:
                    assert 2 * pairs * splits > 2 * 132
    assert count_splits(200, 4, 131072, kib, 132) > count_splits(200, 4, 4096, kib, 132)


# --- paged -----------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("h, kv, d", [(4, 4, 64), (6, 2, 80), (8, 1, 128), (2, 1, 33)])
@pytest.mark.parametrize("slots", [1, 3, 16])
def test_paged_decode_attention(
    dtype: torch.dtype, h: int, kv: int, d: int, slots: int, order: None, guards: Guards
) -> None:
    """Blocks in any order, keys and values side by side, and numbers past a row's length that name no block."""
    lengths = int32(2 * slots + 1, 0, slots, 1)
    table = torch.randperm(12, generator=torch.Generator().manual_seed(slots)).view(4, 3).to(torch.int32)
    used = torch.arange(3) * slots < lengths[:, None]
    table = torch.where(used, table, int32(-7, 10**6, 12)[None])
    both = guards.input(randn(12, 2, slots, kv, d, dtype=dtype, seed=1))
    k, v = both.unbind(1)
    dense = (references.unpaged(cache, table, lengths) for cache in (k, v))
    q = guards.input(randn(4, h, d, dtype=dtype))
    ours = ops.paged_decode_attention(q, k, v, guards.input(table), guards.input(lengths))
    close(ours, references.decode_attention(q, *dense, lengths), dtype)
    assert not ours[1].any()


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("slots", [7, 16, 100])
def test_a_long_paged_row(slots: int, guards: Guards) -> None:
    """In splits, through a table with columns apart."""
    blocks = -(-600 // slots)
    both = torch.randperm(2 * blocks, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    table = guards.input(both.view(2, blocks).t().contiguous()).t()
    k, v = (guards.input(randn(2 * blocks, slots, 1, 128, seed=seed)) for seed in (1, 2))
    q, lengths = guards.input(randn(2, 4, 128)), int32(600, 333)
    dense = (references.unpaged(cache, table, lengths) for cache in (k, v))
    close(
        ops.paged_decode_attention(q, k, v, table, lengths),
        references.decode_attention(q, *dense, lengths),
        torch.float32,
    )


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("block", [-1, 3, 2**31 - 1])
@pytest.mark.parametrize("length", [5, 8])
def test_a_block_that_the_cache_does_not_have_is_nan(block: int, length: int, guards: Guards) -> None:
    q, cache = guards.input(randn(2, 2, 16)), guards.input(randn(3, 4, 1, 16, seed=1))
    out = ops.paged_decode_attention(q, cache, cache, int32(0, block, 2, block).view(2, 2), int32(length, 4))
    assert out[0].isnan().all() and out[1].isfinite().all()


# --- kv_write --------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("cache_dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("h, d, offset", [(2, 16, 0), (3, 5, 0), (40, 64, 0), (2, 64, 1)])
def test_kv_write(
    dtype: torch.dtype, cache_dtype: torch.dtype, h: int, d: int, offset: int, order: None, guards: Guards
) -> None:
    """Tokens with a slot, without one, and with one past the end of the cache."""
    tokens = 11
    k = guards.input(randn(tokens, h, d + 8, dtype=dtype))[..., :d]
    v = guards.input(randn(h, tokens, d, dtype=dtype, seed=1).transpose(0, 1), offset)
    slots = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:tokens]
    slots[::4], slots[1], slots[2] = -1, 20, 2**40
    k_cache, v_cache = (guards.empty((5, 4, h, d), cache_dtype) for _ in range(2))
    k_cache.fill_(7)
    v_cache.fill_(8)
    wanted = [torch.full((20, h, d), fill, dtype=cache_dtype) for fill in (7, 8)]
    for t, slot in enumerate(slots.tolist()):
        if 0 <= slot < 20:
            wanted[0][slot], wanted[1][slot] = k[t].to(cache_dtype), v[t].to(cache_dtype)
    assert ops.kv_write(k, v, k_cache, v_cache, guards.input(slots)) is None
    assert torch.equal(k_cache.view(20, h, d), wanted[0]) and torch.equal(v_cache.view(20, h, d), wanted[1])


@pytest.mark.usefixtures("cuda")
def test_what_is_written_is_read() -> None:
    k, v = randn(9, 2, 64), randn(9, 2, 64, seed=1)
    k_cache, v_cache = torch.zeros(2, 4, 4, 2, 64)
    table = int32(3, 1, 2).view(1, 3)
    places = torch.arange(9)
    ops.kv_write(k, v, k_cache, v_cache, table[0].long()[places // 4] * 4 + places % 4)
    q = randn(1, 4, 64)
    expected = references.decode_attention(q, k.transpose(0, 1)[None], v.transpose(0, 1)[None], int32(9))
    close(ops.paged_decode_attention(q, k_cache, v_cache, table, int32(9)), expected, torch.float32)


# --- what is refused -------------------------------------------------------------------------------------------------

ONE, DENSE, PAGED = torch.zeros(1, 2, 16), torch.zeros(1, 2, 4, 16), torch.zeros(3, 4, 2, 16)
TABLE, SLOTS = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
GIVEN: dict[str, dict[str, Any]] = {
    "decode_attention": {"q": ONE, "k": DENSE, "v": DENSE, "lengths": int32(1)},
    "paged_decode_attention": {
        "q": ONE, "k_cache": PAGED, "v_cache": PAGED, "block_table": TABLE, "lengths": int32(1),
    },
    "kv_write": {"k": ONE, "v": ONE, "k_cache": PAGED, "v_cache": PAGED, "slots": SLOTS},
}  # fmt: skip
REFUSED = [
    ("decode_attention", {"q": ONE[0]}, r"q has shape \[2, 16\], k \[1, 2, 4, 16\]; takes \[B, H, D\] and"),
    ("decode_attention", {"q": torch.zeros(2, 2, 16)}, r"q has shape \[2, 2, 16\], k \[1, 2, 4, 16\]"),
    ("decode_attention", {"v": DENSE[:, :, :3]}, r"v has shape \[1, 2, 3, 16\], k \[1, 2, 4, 16\]; takes one shape"),
    ("decode_attention", {"q": ONE[..., :8]}, "q has head dim 8, k 16; takes one, of 128 at most"),
    (
        "decode_attention",
        {"q": torch.zeros(1, 2, 136), "k": torch.zeros(1, 2, 4, 136), "v": torch.zeros(1, 2, 4, 136)},
        "q has head dim 136, k 136; takes one, of 128 at most",
    ),
    ("decode_attention", {"q": torch.zeros(1, 3, 16)}, "q has 3 heads, k 2; takes a multiple"),
    ("decode_attention", {"lengths": int32(1, 1)}, r"lengths is torch.int32 \[2\]; takes int32 \[B\], here \[1\]"),
    ("decode_attention", {"lengths": int32(1).long()}, r"lengths is torch.int64 \[1\]; takes int32"),
    ("decode_attention", {"lengths": int32(1).to("meta")}, "lengths is on meta; takes cpu, where q is"),
    ("decode_attention", {"key_bias": torch.zeros(3)}, r"key_bias is torch.float32 \[3\]; takes float32 \[C\], here"),
    ("decode_attention", {"key_bias": torch.zeros(4).half()}, r"key_bias is torch.float16 \[4\]; takes float32"),
    ("decode_attention", {"k": DENSE.half()}, "k is torch.float16, q torch.float32; takes one dtype"),
    ("decode_attention", {"q": ONE.double()}, "q is torch.float64; takes float32, float16 and bfloat16"),
    ("decode_attention", {"v": DENSE.to("meta")}, "v is on meta, q on cpu; takes one device"),
    ("decode_attention", {"q": ONE.clone().requires_grad_()}, "the kernel has no backward, and a gradient is wanted"),
    ("paged_decode_attention", {"k_cache": PAGED[0]}, r"k_cache \[4, 2, 16\]; takes .* and \[N, S, Hkv, D\]"),
    ("paged_decode_attention", {"k_cache": PAGED[:0]}, r"k_cache \[0, 4, 2, 16\]; takes"),
    ("paged_decode_attention", {"v_cache": PAGED[:2]}, r"v_cache has shape \[2, 4, 2, 16\], k_cache"),
    ("paged_decode_attention", {"q": torch.zeros(1, 3, 16)}, "q has 3 heads, k_cache 2; takes a multiple"),
    ("paged_decode_attention", {"block_table": TABLE[0]}, r"block_table is torch.int32 \[2\]; takes int32 \[B, M\]"),
    ("paged_decode_attention", {"block_table": TABLE.long()}, r"block_table is torch.int64 \[1, 2\]; takes int32"),
    ("paged_decode_attention", {"lengths": int32()}, r"lengths is torch.int32 \[0\]; takes int32 \[B\], here \[1\]"),
    ("kv_write", {"k": ONE[..., :8]}, r"k has shape \[1, 2, 8\], k_cache \[3, 4, 2, 16\]; takes \[T, Hkv, D\] and"),
    ("kv_write", {"v_cache": PAGED[0]}, r"v has shape \[1, 2, 16\], v_cache \[4, 2, 16\]; takes"),
    ("kv_write", {"v": ONE.expand(2, 2, 16)}, r"v has shape \[2, 2, 16\], k \[1, 2, 16\]; takes one shape"),
    ("kv_write", {"v_cache": PAGED[:2]}, "takes one shape, and caches of one shape"),
    ("kv_write", {"k_cache": PAGED[:, ::2]}, r"k_cache has strides \[128, 64, 16, 1\]; takes contiguous caches"),
    ("kv_write", {"slots": SLOTS.int()}, r"slots is torch.int32 \[1\]; takes int64 \[T\], here \[1\]"),
    ("kv_write", {"v": ONE.half()}, "v is torch.float16, k torch.float32; takes one dtype"),
    ("kv_write", {"v_cache": PAGED.half()}, "v_cache is torch.float16, k_cache torch.float32; takes one dtype"),
]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("op, changed, message", REFUSED, ids=[f"{op}-{next(iter(c))}" for op, c, _ in REFUSED])
def test_what_is_refused(op: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DeviceError, match=f'{op} on backend "cuda": .*{message}'):
        getattr(ops, op)(*(GIVEN[op] | changed).values())


# --- what torch asks -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cuda")
@each_dtype
def test_opcheck(dtype: torch.dtype) -> None:
    kernels = torch.ops.llama_mm
    q, lengths = randn(2, 3, 4, 16, dtype=dtype)[:, 1], int32(8, 3)
    k, v = (randn(2, 8, 2, 16, dtype=dtype, seed=seed).transpose(1, 2) for seed in (1, 2))
    torch.library.opcheck(kernels.cuda_decode_attention.default, (q, k, v, lengths, None))
    torch.library.opcheck(kernels.cuda_decode_attention.default, (q, k, v, lengths, randn(8)))
    k_cache, v_cache, table = randn(4, 4, 2, 16, dtype=dtype), randn(4, 4, 2, 16, dtype=dtype), int32(0, 1, 2, 3)
    arguments = (q, k_cache, v_cache, table.view(2, 2), lengths)
    torch.library.opcheck(kernels.cuda_paged_decode_attention.default, arguments)
    new = randn(2, 2, 16, dtype=dtype)
    torch.library.opcheck(kernels.cuda_kv_write.default, (new, new, k_cache, v_cache, torch.tensor([3, -1])))


def step(
    q: Tensor, new: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, table: Tensor, lengths: Tensor
) -> Any:
    """Store a token, and attend to all of its row: paged, and to the first block as a dense cache."""
    ops.kv_write(new, new + 1, k_cache, v_cache, slots)
    paged = ops.paged_decode_attention(q, k_cache, v_cache, table, lengths)
    dense = [cache[table[:, 0].long()].transpose(1, 2) for cache in (k_cache, v_cache)]
    return paged + ops.decode_attention(q, *dense, lengths.clamp(max=4), torch.zeros(4))


@pytest.mark.usefixtures("cuda")
def test_a_compiled_graph_has_no_break() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 3):
        slots, table = torch.arange(rows) * 8 + 5, torch.arange(2 * rows, dtype=torch.int32).view(rows, 2)
        fixed = (slots, table, torch.full((rows,), 6, dtype=torch.int32))
        mine, theirs = ([torch.zeros(6, 4, 2, 16), torch.ones(6, 4, 2, 16)] for _ in range(2))
        q, new = randn(rows, 4, 16), randn(rows, 2, 16, seed=1)
        torch.testing.assert_close(compiled(q, new, *mine, *fixed), step(q, new, *theirs, *fixed))
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
        assert torch.equal(mine[1][1, 1], new[0] + 1)
