"""decode_block and paged_decode_block on CPUs against the same block out of the other ops' references, on every
instruction set.

Shapes: B rows · E hidden size · H query heads · Hkv key heads · D head dim · F feed-forward size · C slots of a row
N blocks · S slots of a block
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.errors import DeviceError
from llama_multimodal.ops import DecoderBlock, Format, PackedProduct
from llama_multimodal.ops.backends.cpu import decode_block

from ..references import name_of, randn
from .conftest import Guards

SLOTS = 40
# What the block's output, of order 1, may be off by: bf16 rounds eight times in between.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}

each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=name_of)


def block_of(
    guards: Guards,
    dtype: torch.dtype,
    formats: tuple[Format, Format, Format, Format] = ("int4", "int8", "int8", "int4"),
    *,
    sizes: tuple[int, int, int, int, int] = (96, 4, 2, 32, 160),
    symmetric: bool = True,
    int8_activations: bool = False,
    bias: bool = False,
    seed: int = 0,
) -> DecoderBlock:
    """sizes: E, H, Hkv, D, F"""
    hidden, heads, kv_heads, dim, inner = sizes
    shapes = ((heads + 2 * kv_heads) * dim, hidden), (hidden, heads * dim), (2 * inner, hidden), (hidden, inner)

    def product(number: int, outputs: int, inputs: int, format: Format) -> PackedProduct:
        weight = randn(outputs, inputs, seed=seed + number) / inputs**0.5
        packed = ops.prepare_weight(ops.pack_weight(weight, format, symmetric=symmetric)).mapped(guards.input)
        added = guards.input(randn(outputs, dtype=dtype, seed=seed + number) * 0.1) if bias else None
        return PackedProduct(packed, added, int8_activations and format != "bf16")

    products = [product(i, *shape, format) for i, (shape, format) in enumerate(zip(shapes, formats, strict=True))]
    norms = [guards.input(1 + randn(hidden, dtype=dtype, seed=seed + i) / 10) for i in (5, 6)]
    return DecoderBlock(*products, *norms, 1e-5, heads, kv_heads)


def inputs_of(block: DecoderBlock, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Caches whose unused slots hold NaN: whoever reads one shows it."""
    dim = block.head_dim
    lengths = torch.tensor([1 + 13 * row % SLOTS for row in range(rows)], dtype=torch.int32)
    caches = []
    for seed in (1, 2):
        cache = randn(rows, block.kv_heads, SLOTS, dim, dtype=dtype, seed=seed)
        for row, length in enumerate(lengths.tolist()):
            cache[row, :, length - 1 :] = torch.nan
        caches.append(cache)
    angles = (lengths[:, None] - 1) * torch.rand(dim // 2, generator=torch.Generator().manual_seed(3))
    return {
        "x": randn(rows, block.qkv.weight.shape[1], dtype=dtype),
        "cos": angles.cos(), "sin": angles.sin(), "k_cache": caches[0], "v_cache": caches[1], "lengths": lengths,
    }  # fmt: skip


def run(block: DecoderBlock, given: dict[str, Any], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The output and both caches; what was given stays as it was. The reference multiplies unused slots by zero."""
    copies = {name: value.nan_to_num() if backend == "torch" else value.clone() for name, value in given.items()}
    with ops.use_backend(backend):
        out = ops.decode_block(copies.pop("x"), block, **copies)
    return out, copies["k_cache"], copies["v_cache"]


def compare(block: DecoderBlock, given: dict[str, Any]) -> None:
    dtype, lengths = given["x"].dtype, given["lengths"]
    (ours, *our_caches), (plain, *their_caches) = run(block, given, "cpu"), run(block, given, "torch")
    assert ours.dtype == dtype and ours.shape == plain.shape
    torch.testing.assert_close(ours, plain, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for mine, theirs, before in zip(our_caches, their_caches, (given["k_cache"], given["v_cache"]), strict=True):
        for row, length in enumerate(lengths.tolist()):
            slot = (row, slice(None), length - 1)
            torch.testing.assert_close(mine[slot], theirs[slot], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            mine[slot] = before[slot]
        assert torch.equal(mine.nan_to_num(7.0), before.nan_to_num(7.0))  # nothing else was written


@each_dtype
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("int8_activations", [False, True], ids=["", "a8"])
def test_whole_numbers(
    instruction_set: str, guards: Guards, dtype: torch.dtype, rows: int, symmetric: bool, int8_activations: bool
) -> None:
    block = block_of(guards, dtype, symmetric=symmetric, int8_activations=int8_activations)
    compare(block, inputs_of(block, rows, dtype))


@each_dtype
@pytest.mark.parametrize("formats", [("bf16",) * 4, ("int8", "bf16", "int4", "bf16")], ids=["bf16", "mixed"])
def test_bf16_weights(instruction_set: str, guards: Guards, dtype: torch.dtype, formats: Any) -> None:
    block = block_of(guards, dtype, formats)
    compare(block, inputs_of(block, 2, dtype))


@each_dtype
@pytest.mark.parametrize(
    "sizes", [(64, 1, 1, 64, 32), (160, 2, 1, 80, 224), (96, 3, 3, 32, 64), (32, 8, 1, 12, 96)], ids=str
)
def test_sizes(instruction_set: str, guards: Guards, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """A row that ends within a vector, a head dim that does, heads with and without keys of their own."""
    block = block_of(guards, dtype, sizes=sizes, bias=True)  # type: ignore[arg-type]
    compare(block, inputs_of(block, 2, dtype))


def test_more_threads_than_work(instruction_set: str, guards: Guards, threads: None) -> None:
    block = block_of(guards, torch.float32, sizes=(256, 4, 2, 64, 512))
    compare(block, inputs_of(block, 4, torch.float32))


def test_caches_with_gaps(cpu: None, guards: Guards) -> None:
    """As a view into a larger cache."""
    block = block_of(guards, torch.float32)
    given = inputs_of(block, 2, torch.float32)
    expected, *_ = run(block, given, "torch")
    for name in ("k_cache", "v_cache"):
        room = torch.full((2, block.kv_heads, 2 * SLOTS, block.head_dim), torch.nan)
        room[:, :, ::2] = given[name]
        given[name] = room[:, :, ::2]
    torch.testing.assert_close(ops.decode_block(block=block, **given), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("length", [0, -1, SLOTS + 1])
def test_a_length_out_of_range_writes_nothing(cpu: None, guards: Guards, length: int) -> None:
    block = block_of(guards, torch.float32)
    given = inputs_of(block, 2, torch.float32)
    given["lengths"][1] = length
    before = given["k_cache"].clone()
    with pytest.raises(ValueError, match=f"row 1: its length must be from 1 to the cache's {SLOTS} slots"):
        ops.decode_block(block=block, **given)
    assert torch.equal(given["k_cache"].nan_to_num(7.0), before.nan_to_num(7.0))


def test_what_it_does_not_take(cpu: None, guards: Guards) -> None:
    block = block_of(guards, torch.float32)
    given = inputs_of(block, 2, torch.float32)
    plain = dataclasses.replace(block, down=PackedProduct(ops.pack_weight(randn(96, 160), "int8")))
    half = {name: value.half() if value.is_floating_point() else value for name, value in given.items()}
    many = inputs_of(block, 9, torch.float32)
    narrow = given | {"k_cache": given["k_cache"][..., :16]}
    short = given | {"cos": given["cos"][:, :8]}
    for other, arguments, message in (
        (plain, given, 'has the layout "plain"'),
        (block, half, "takes fp32 and bf16"),
        (block, many, "of 8 rows at most"),
        (block, narrow, "the caches have shapes"),
        (block, short, "cos and sin have shapes"),
    ):
        with pytest.raises(DeviceError, match=message):
            ops.decode_block(block=other, **arguments)


# --- over blocks -----------------------------------------------------------------------------------------------------

BLOCK = 7  # slots, which do not divide SLOTS


def paged(given: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """The same keys and values in blocks, in no order, among blocks that are nobody's; and the order of a row's slots
    [B, S·M] in the caches' N·S."""
    rows, kv_heads, slots, dim = given["k_cache"].shape
    each = -(-slots // BLOCK)
    table = torch.randperm(rows * each + 3, generator=torch.Generator().manual_seed(4))[: rows * each].view(rows, each)
    order = (table[:, :, None] * BLOCK + torch.arange(BLOCK)).flatten(1)
    made = {**given, "block_table": table.to(torch.int32)}
    for name in ("k_cache", "v_cache"):
        cache = torch.full((rows * each + 3, BLOCK, kv_heads, dim), torch.nan, dtype=given["x"].dtype)
        cache.view(-1, kv_heads, dim)[order[:, :slots]] = given[name].transpose(1, 2)
        made[name] = cache
    return made, order


@each_dtype
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("formats", [("int4", "int8", "int8", "int4"), ("bf16",) * 4], ids=["ints", "bf16"])
def test_blocks_hold_the_same(
    instruction_set: str, guards: Guards, dtype: torch.dtype, rows: int, formats: Any
) -> None:
    """What rows of one piece give, and each new key and value in its block."""
    block = block_of(guards, dtype, formats)
    rows = min(rows, 2) if formats[0] == "bf16" else rows
    given = inputs_of(block, rows, dtype)
    dense, k_dense, v_dense = run(block, given, "cpu")
    made, order = paged(given)
    before = {name: made[name].clone() for name in ("k_cache", "v_cache")}
    with ops.use_backend("cpu"):
        out = ops.paged_decode_block(made["x"], block, **{name: made[name] for name in made if name != "x"})
    torch.testing.assert_close(out, dense, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for name, expected in (("k_cache", k_dense), ("v_cache", v_dense)):
        flat, old = (cache.view(-1, *cache.shape[2:]) for cache in (made[name], before[name]))
        for row, length in enumerate(given["lengths"].tolist()):
            slot = order[row, length - 1]
            assert torch.equal(flat[slot], expected[row, :, length - 1])
            flat[slot] = old[slot]
        assert torch.equal(flat.nan_to_num(7.0), old.nan_to_num(7.0))


def test_the_reference_over_blocks(guards: Guards, cpu: None) -> None:
    block = block_of(guards, torch.float32)
    given = inputs_of(block, 3, torch.float32)
    expected, *_ = run(block, given, "torch")
    made, _ = paged(given)
    made = {name: value.nan_to_num() for name, value in made.items()}
    with ops.use_backend("torch"):
        out = ops.paged_decode_block(made.pop("x"), block, **made)
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("what, value", [("lengths", 0), ("lengths", 43), ("block_table", -1), ("block_table", 99)])
def test_a_block_out_of_range_writes_nothing(cpu: None, guards: Guards, what: str, value: int) -> None:
    block = block_of(guards, torch.float32)
    made, _ = paged(inputs_of(block, 2, torch.float32))
    made[what][1] = value
    before = made["k_cache"].clone()
    with pytest.raises(ValueError, match="row 1: its length must be from 1 to 42, and its blocks from 0 to 14"):
        ops.paged_decode_block(made.pop("x"), block, **made)
    assert torch.equal(made["k_cache"].nan_to_num(7.0), before.nan_to_num(7.0))


def test_torch_knows_the_operator(attached: None, guards: Guards) -> None:
    block = block_of(guards, torch.float32, int8_activations=True)
    given = inputs_of(block, 2, torch.float32)
    tensors, numbers = decode_block.flattened(block)
    torch.library.opcheck(
        decode_block.cpu_decode_block,
        (
            given["x"], tensors, numbers, block.input_norm, block.post_attention_norm, block.eps, block.heads,
            block.kv_heads, given["cos"], given["sin"], given["k_cache"].nan_to_num(), given["v_cache"].nan_to_num(),
            None, None, None, given["lengths"],
        ),
    )  # fmt: skip
