"""Decode attention over dense and paged caches, cross-attention of one token, and kv_write, on CPUs, against fp64.

Shapes: B rows · H query heads · Hkv key heads · D head dim · C slots of a row · N blocks · S slots of a block
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.errors import DeviceError
from llama_multimodal.ops import KeyRanges, Span

from .. import references
from ..references import close, name_of, randn
from .conftest import Guards

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)

# B, H, Hkv, D, C: groups of 1 to 8 heads; dims with and without a rest; more keys than a chunk
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 4, 4, 16, 9),
    (3, 6, 3, 64, 70),
    (2, 6, 2, 80, 33),
    (3, 4, 1, 128, 65),
    (2, 10, 2, 36, 40),
    (2, 8, 1, 7, 100),
]

# Of blocks, whose key heads a thread reads together: keys in several parts, and rows of very different lengths
LONG = [(1, 4, 2, 64, 700), (3, 6, 3, 40, 500), (2, 8, 8, 16, 1301)]


def caches(b: int, h: int, c: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, C, D] with a model's strides: views of more slots than are used."""
    k, v = (randn(b, c + 3, h, d, dtype=dtype, seed=seed).transpose(1, 2)[:, :, :c] for seed in (1, 2))
    return k, v


def some_lengths(rows: int, slots: int) -> Tensor:
    return torch.tensor([slots, 0, slots // 2][:rows], dtype=torch.int32)


# --- dense -----------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_attention(
    instruction_set: str, dtype: torch.dtype, shape: tuple[int, ...], guards: Guards, threads: None
) -> None:
    b, h, kv, d, c = shape
    q, (k, v) = guards.input(randn(b, h, d, dtype=dtype)), map(guards.input, caches(b, kv, c, d, dtype))
    lengths, bias = some_lengths(b, c), guards.input(randn(c, seed=3))
    ours = ops.decode_attention(q, k, v, lengths)
    close(ours, references.decode_attention(q, k, v, lengths), dtype)
    assert (ours[lengths == 0] == 0).all()
    close(ops.decode_attention(q, k, v, lengths, bias), references.decode_attention(q, k, v, lengths, bias), dtype)


@each_dtype
@pytest.mark.parametrize("length", [0, 1, 127, 700, 1501])
def test_keys_are_split_over_threads(
    instruction_set: str, threads: None, dtype: torch.dtype, length: int, guards: Guards
) -> None:
    """One row and one key head, three threads: each takes a part of the keys."""
    q, (k, v) = guards.input(randn(1, 2, 32, dtype=dtype)), caches(1, 1, 1501, 32, dtype)
    lengths, bias = torch.tensor([length], dtype=torch.int32), randn(1501, seed=3)
    bias[:140] = -math.inf  # a whole part may be hidden
    close(ops.decode_attention(q, k, v, lengths), references.decode_attention(q, k, v, lengths), dtype)
    seen = references.decode_attention(q, k, v, lengths, bias) if length > 140 else torch.zeros(1, 2, 32).double()
    close(ops.decode_attention(q, k, v, lengths, bias), seen, dtype)


def test_logits_of_any_size(instruction_set: str) -> None:
    """The running maximum keeps exp in range, whichever key comes first; log n counts a key n times."""
    k, v = caches(1, 1, 100, 16, torch.float32)
    lengths, q = torch.tensor([100], dtype=torch.int32), 200 * randn(1, 2, 16)
    for keys in (k, k.flip(2)):
        close(
            ops.decode_attention(q, keys, v, lengths), references.decode_attention(q, keys, v, lengths), torch.float32
        )
    counts = torch.randint(1, 9, (100,), generator=torch.Generator().manual_seed(0))
    many_k, many_v = (x.repeat_interleave(counts, dim=2) for x in (k, v))
    repeated = references.decode_attention(q / 200, many_k, many_v, torch.tensor([int(counts.sum())]))
    close(ops.decode_attention(q / 200, k, v, lengths, counts.float().log()), repeated, torch.float32)


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_shows(instruction_set: str, where: str) -> None:
    q, (k, v), lengths = randn(2, 1, 16), caches(2, 1, 40, 16, torch.float32), torch.tensor([40, 1], dtype=torch.int32)
    for row in (0, 1):
        spoilt = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
        spoilt[where][row].view(-1)[0] = math.nan
        ours = ops.decode_attention(**spoilt, lengths=lengths)
        assert ours[row].isnan().any() and ours[1 - row].isfinite().all()


@each_dtype
def test_strides_of_q_and_the_cache(instruction_set: str, dtype: torch.dtype) -> None:
    q = randn(2, 5, 4, 16, dtype=dtype)[:, 2]
    every = randn(2, 2, 9, 32, dtype=dtype, seed=1)
    lengths = torch.tensor([9, 4], dtype=torch.int32)
    for k in (
        every[..., ::2],
        every[..., :16],
        every.transpose(0, 1)[..., 16:],
        every[:1, ..., :16].expand(2, 2, 9, 16),
    ):
        close(ops.decode_attention(q, k, k, lengths), references.decode_attention(q, k, k, lengths), dtype)


# --- paged -----------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("shape", SHAPES + LONG, ids=str)
@pytest.mark.parametrize("slots", [1, 16])
def test_paged_decode_attention(
    instruction_set: str, dtype: torch.dtype, shape: tuple[int, ...], slots: int, guards: Guards, threads: None
) -> None:
    """Blocks in any order, and numbers past a row's length that name no block."""
    b, h, kv, d, c = shape
    blocks = -(-c // slots)
    table = torch.randperm(b * blocks, generator=torch.Generator().manual_seed(0)).view(b, blocks).to(torch.int32)
    lengths = some_lengths(b, c)
    used = torch.arange(blocks) * slots < lengths[:, None]
    table = torch.where(used, table, torch.tensor([-7, 10**6] * b, dtype=torch.int32)[:b, None])
    q = guards.input(randn(b, h, d, dtype=dtype))
    k, v = (guards.input(randn(b * blocks, slots, kv, d, dtype=dtype, seed=seed)) for seed in (1, 2))
    dense = (references.unpaged(cache, table, lengths) for cache in (k, v))
    ours = ops.paged_decode_attention(q, k, v, guards.input(table), guards.input(lengths))
    close(ours, references.decode_attention(q, *dense, lengths), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=name_of)
def test_kv_write(cpu: None, threads: None, dtype: torch.dtype, guards: Guards) -> None:
    tokens = 70
    k, v = (randn(2, tokens, 24, dtype=dtype, seed=seed).transpose(0, 1)[..., 4:20] for seed in (1, 2))
    slots = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:tokens]
    slots[::9] = -1
    k_cache, v_cache = (guards.empty((25, 4, 2, 16), dtype) for _ in range(2))
    k_cache.fill_(7)
    v_cache.fill_(8)
    wanted = [torch.full((100, 2, 16), fill, dtype=dtype) for fill in (7, 8)]
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            wanted[0][slot], wanted[1][slot] = k[t], v[t]
    assert ops.kv_write(k, v, k_cache, v_cache, slots) is None
    assert torch.equal(k_cache.view(100, 2, 16), wanted[0]) and torch.equal(v_cache.view(100, 2, 16), wanted[1])


def test_a_large_kv_write_is_split_over_threads(cpu: None, threads: None) -> None:
    k, v = randn(500, 2, 64), randn(500, 2, 64, seed=1)
    k_cache, v_cache = torch.zeros(2, 512, 2, 64).unbind(0)
    k_cache, v_cache = k_cache.view(32, 16, 2, 64), v_cache.view(32, 16, 2, 64)
    slots = torch.arange(500).flip(0)
    ops.kv_write(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache.flatten(0, 1)[:500], k.flip(0)) and torch.equal(v_cache.flatten(0, 1)[:500], v.flip(0))
    assert (k_cache.flatten(0, 1)[500:] == 0).all()


# --- cross-attention -------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("h, kv, d", [(1, 1, 16), (4, 2, 80), (6, 2, 128)])
def test_cross_attention(
    instruction_set: str, dtype: torch.dtype, h: int, kv: int, d: int, guards: Guards, threads: None
) -> None:
    """Rows that read ranges which overlap, one key, or nothing."""
    ranges = KeyRanges.of([Span(0, 0, 1, 0, 37), Span(1, 0, 1, 20, 90), Span(3, 0, 1, 89, 90)], rows=4, tokens=1)
    q = guards.input(randn(4, 1, h, d, dtype=dtype).transpose(1, 2))
    k, v = (guards.input(randn(90, kv, d, dtype=dtype, seed=seed).transpose(0, 1)) for seed in (1, 2))
    ours = ops.cross_attention(q, k, v, ranges)
    close(ours, references.cross_attention(q, k, v, ranges.table), dtype)
    assert (ours[2] == 0).all()


def test_prefill_is_left_to_torch(attached: None) -> None:
    q, k = randn(1, 2, 3, 16), randn(2, 9, 16)
    ranges = KeyRanges.of([Span(0, 1, 3, 0, 9)], rows=1, tokens=3)
    expected = references.cross_attention(q, k, k, ranges.table)
    close(ops.cross_attention(q, k, k, ranges), expected, torch.float32)
    with ops.use_backend("cpu"):
        close(ops.cross_attention(q, k, k, ranges), expected, torch.float32)


# --- what is refused -------------------------------------------------------------------------------------------------

ONE, HALF = torch.zeros(1, 2, 16), torch.zeros(1, 2, 16, dtype=torch.float16)
DENSE, PAGED = torch.zeros(1, 2, 4, 16), torch.zeros(3, 4, 2, 16)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "op, arguments, message",
    [
        ("decode_attention", (ONE, DENSE, DENSE, int32(5)), "row 0: its length must be from 0 to the cache's 4 slots"),
        ("decode_attention", (ONE, DENSE, DENSE, int32(-1)), "row 0: its length"),
        ("decode_attention", (ONE, DENSE, DENSE[:, :, :3], int32(1)), r"k has shape \(1, 2, 4, 16\), and v"),
        ("decode_attention", (ONE[..., :8], DENSE, DENSE, int32(1)), "q has a head dim of 8, and k of 16"),
        ("decode_attention", (torch.zeros(1, 3, 16), DENSE, DENSE, int32(1)), "3 query heads cannot share 2 key heads"),
        ("decode_attention", (ONE, DENSE, DENSE, int32(1, 1)), "q has 1 rows, k 1, and lengths shape"),
        ("decode_attention", (ONE, DENSE, DENSE, int32(1), torch.zeros(3)), r"key_bias has shape \(3,\), and k 4"),
        ("decode_attention", (ONE[0], DENSE, DENSE, int32(1)), r"takes q \[B, H, D\]"),
        ("paged_decode_attention", (ONE, PAGED, PAGED, int32(1, 3)[None], int32(5)), "row 0: .* from 0 to 2"),
        ("paged_decode_attention", (ONE, PAGED, PAGED, int32(-1)[None], int32(1)), "row 0: .* from 0 to 2"),
        ("paged_decode_attention", (ONE, PAGED, PAGED, int32(0, 1)[None], int32(9)), "length must be from 0 to 8"),
        ("paged_decode_attention", (ONE, PAGED, PAGED, int32(0), int32(1)), "block_table shape"),
        ("paged_decode_attention", (ONE, PAGED[0], PAGED[0], int32(0)[None], int32(1)), r"k_cache \[N, S, Hkv, D\]"),
        ("kv_write", (ONE, ONE, PAGED, PAGED, torch.tensor([12])), r"slots\[0\] is 12, and the cache has 12 slots"),
        ("kv_write", (ONE, ONE, PAGED, PAGED, torch.tensor([1, 2])), "slots has shape"),
        ("kv_write", (ONE, ONE[..., :8], PAGED, PAGED, torch.tensor([1])), "v and its cache have shapes"),
        ("cross_attention", (ONE[:, :, None], DENSE[0], DENSE[0], [Span(0, 0, 1, 0, 5)]), "row 0: its range of keys"),
        ("cross_attention", (ONE, DENSE[0], DENSE[0], []), r"takes q \[B, H, T, D\]"),
    ],
)
def test_what_does_not_fit_is_named(cpu: None, op: str, arguments: tuple, message: str) -> None:
    if op == "cross_attention":
        arguments = (*arguments[:-1], KeyRanges.of(arguments[-1], rows=1, tokens=1))
    with pytest.raises(ValueError, match=f"^{op}.*{message}"):
        getattr(ops, op)(*arguments)


def test_a_bad_slot_leaves_the_cache_alone(cpu: None) -> None:
    cache = torch.zeros(3, 4, 2, 16)
    with pytest.raises(ValueError, match="kv_write"):
        ops.kv_write(torch.ones(2, 2, 16), torch.ones(2, 2, 16), cache, cache, torch.tensor([0, 99]))
    assert (cache == 0).all()


@pytest.mark.parametrize(
    "op, arguments, message",
    [
        ("decode_attention", (HALF, DENSE.half(), DENSE.half(), int32(1)), r"takes fp32 and bf16, not torch\.float16"),
        ("decode_attention", (ONE, DENSE, DENSE.bfloat16(), int32(1)), "takes one dtype, and q is .*, v "),
        ("decode_attention", (ONE, DENSE.to("meta"), DENSE, int32(1)), "takes CPU tensors, and k is on meta"),
        ("paged_decode_attention", (HALF, PAGED, PAGED, int32(0)[None], int32(1)), "takes fp32 and bf16"),
        ("kv_write", (ONE, ONE, PAGED, PAGED.half(), torch.tensor([1])), "takes one dtype, and k is .*, v_cache "),
        ("kv_write", (ONE, ONE, PAGED[:, :2], PAGED[:, :2], torch.tensor([1])), "takes contiguous caches"),
    ],
)
def test_what_is_refused_says_why(cpu: None, op: str, arguments: tuple, message: str) -> None:
    with pytest.raises(DeviceError, match=f'{op} on backend "cpu": {message}'):
        getattr(ops, op)(*arguments)


# --- torch.library ---------------------------------------------------------------------------------------------------


def test_opcheck(cpu: None) -> None:
    kernels = torch.ops.llama_mm
    q, (k, v), lengths = randn(2, 4, 16), caches(2, 2, 8, 16, torch.float32), int32(8, 3)
    torch.library.opcheck(kernels.cpu_decode_attention.default, (q, k, v, lengths, randn(8)))
    k_cache, v_cache, table = randn(4, 4, 2, 16), randn(4, 4, 2, 16, seed=1), int32(0, 1, 2, 3).view(2, 2)
    torch.library.opcheck(kernels.cpu_paged_decode_attention.default, (q, k_cache, v_cache, table, lengths))
    new = randn(2, 2, 16)
    torch.library.opcheck(kernels.cpu_kv_write.default, (new, new, k_cache, v_cache, torch.tensor([3, -1])))
    ranges = int32(0, 8, 2, 4).view(2, 1, 2)
    torch.library.opcheck(kernels.cpu_cross_attention.default, (q[:, :, None], k[0], v[0], ranges))
