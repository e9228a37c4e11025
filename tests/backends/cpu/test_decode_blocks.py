"""decode_blocks and paged_decode_blocks on CPUs against the same blocks out of the other ops' references, on every
instruction set.

Shapes: B rows · E hidden size · H query heads · Hkv key heads · D head dim · F feed-forward size · C slots of a row
N cache blocks · S slots of a cache block
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
from llama_multimodal.ops.backends.cpu import decode_blocks
from llama_multimodal.ops.backends.cpu.packed_linear import few_rows
from llama_multimodal.ops.quantized_blocks import CACHE_DTYPES, QuantizedBlocks, quantize

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


def one(block: DecoderBlock, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `decode_blocks` or `paged_decode_blocks` for a single block."""
    rest = {name: value for name, value in given.items() if not name.endswith("_cache")}
    return rest | {"blocks": [block], "k_caches": [given["k_cache"]], "v_caches": [given["v_cache"]]}


def run(block: DecoderBlock, given: dict[str, Any], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The output and both caches; what was given stays as it was. The reference multiplies unused slots by zero."""
    copies = {name: value.nan_to_num() if backend == "torch" else value.clone() for name, value in given.items()}
    with ops.use_backend(backend):
        out = ops.decode_blocks(**one(block, copies))
    return out, copies["k_cache"], copies["v_cache"]


def compare(block: DecoderBlock, given: dict[str, Any], int8_activations: bool = False) -> None:
    dtype, lengths = given["x"].dtype, given["lengths"]
    (ours, *our_caches), (plain, *their_caches) = run(block, given, "cpu"), run(block, given, "torch")
    assert ours.dtype == dtype and ours.shape == plain.shape
    if int8_activations:  # the last digit of a norm may decide which of two steps a value is rounded to
        off = (ours - plain).abs() - TOLERANCE[dtype] * (1 + plain.abs())
        assert off.max() < 0.02
        same = (off <= 0).all(1)
        assert same.sum() >= 0.9 * len(same)
        ours, plain = ours[same], plain[same]
    torch.testing.assert_close(ours, plain, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for mine, theirs, before in zip(our_caches, their_caches, (given["k_cache"], given["v_cache"]), strict=True):
        for row, length in enumerate(lengths.tolist()):
            slot = (row, slice(None), length - 1)
            torch.testing.assert_close(mine[slot], theirs[slot], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            mine[slot] = before[slot]
        assert torch.equal(mine.nan_to_num(7.0), before.nan_to_num(7.0))  # nothing else was written


@each_dtype
@pytest.mark.parametrize("rows", [1, 3, 8, 21])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("int8_activations", [False, True], ids=["", "a8"])
def test_whole_numbers(
    instruction_set: str, guards: Guards, dtype: torch.dtype, rows: int, symmetric: bool, int8_activations: bool
) -> None:
    block = block_of(guards, dtype, symmetric=symmetric, int8_activations=int8_activations)
    compare(block, inputs_of(block, min(rows, few_rows("int4")), dtype), int8_activations)


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
    compare(block, inputs_of(block, min(32, few_rows("int4")), torch.float32))


def test_caches_with_gaps(cpu: None, guards: Guards) -> None:
    """As a view into a larger cache."""
    block = block_of(guards, torch.float32)
    given = inputs_of(block, 2, torch.float32)
    expected, *_ = run(block, given, "torch")
    for name in ("k_cache", "v_cache"):
        room = torch.full((2, block.kv_heads, 2 * SLOTS, block.head_dim), torch.nan)
        room[:, :, ::2] = given[name]
        given[name] = room[:, :, ::2]
    torch.testing.assert_close(ops.decode_blocks(**one(block, given)), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("length", [0, -1, SLOTS + 1])
def test_a_length_out_of_range_writes_nothing(cpu: None, guards: Guards, length: int) -> None:
    block = block_of(guards, torch.float32)
    given = inputs_of(block, 2, torch.float32)
    given["lengths"][1] = length
    before = given["k_cache"].clone()
    with pytest.raises(ValueError, match=f"row 1: its length must be from 1 to the cache's {SLOTS} slots"):
        ops.decode_blocks(**one(block, given))
    assert torch.equal(given["k_cache"].nan_to_num(7.0), before.nan_to_num(7.0))


def test_what_it_does_not_take(cpu: None, guards: Guards) -> None:
    block = block_of(guards, torch.float32)
    given = inputs_of(block, 2, torch.float32)
    plain = dataclasses.replace(block, down=PackedProduct(ops.pack_weight(randn(96, 160), "int8")))
    half = {name: value.half() if value.is_floating_point() else value for name, value in given.items()}
    many = inputs_of(block, few_rows("int4") + 1, torch.float32)
    narrow = given | {"k_cache": given["k_cache"][..., :16]}
    short = given | {"cos": given["cos"][:, :8]}
    for other, arguments, message in (
        (plain, given, 'has the layout "plain"'),
        (block, half, "takes fp32 and bf16"),
        (block, many, f"takes from 1 to {few_rows('int4')}"),
        (block, narrow, "a cache has shape"),
        (block, short, "cos and sin have shapes"),
    ):
        with pytest.raises(DeviceError, match=message):
            ops.decode_blocks(**one(other, arguments))


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
    given = inputs_of(block, min(rows, few_rows("bf16"), few_rows("int4")), dtype)
    dense, k_dense, v_dense = run(block, given, "cpu")
    made, order = paged(given)
    before = {name: made[name].clone() for name in ("k_cache", "v_cache")}
    with ops.use_backend("cpu"):
        out = ops.paged_decode_blocks(**one(block, made))
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
        out = ops.paged_decode_blocks(**one(block, made))
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("what, value", [("lengths", 0), ("lengths", 43), ("block_table", -1), ("block_table", 99)])
def test_a_block_out_of_range_writes_nothing(cpu: None, guards: Guards, what: str, value: int) -> None:
    block = block_of(guards, torch.float32)
    made, _ = paged(inputs_of(block, 2, torch.float32))
    made[what][1] = value
    before = made["k_cache"].clone()
    with pytest.raises(ValueError, match="row 1: its length must be from 1 to 42, and its blocks from 0 to 14"):
        ops.paged_decode_blocks(**one(block, made))
    assert torch.equal(made["k_cache"].nan_to_num(7.0), before.nan_to_num(7.0))


def test_torch_knows_the_operator(attached: None, guards: Guards) -> None:
    block = block_of(guards, torch.float32, int8_activations=True)
    given = inputs_of(block, 2, torch.float32)
    caches = [[given[name].nan_to_num()] for name in ("k_cache", "v_cache")]
    torch.library.opcheck(
        decode_blocks.cpu_decode_blocks,
        (
            given["x"], *decode_blocks.flattened([block]), block.eps, block.heads, block.kv_heads, given["cos"],
            given["sin"], *caches, [], [], None, given["lengths"],
        ),
    )  # fmt: skip


# --- several blocks --------------------------------------------------------------------------------------------------

FORMATS: tuple[Any, ...] = (("int4", "int8", "int8", "int4"), ("bf16",) * 4, ("int8",) * 4)


def stack_of(guards: Guards, dtype: torch.dtype, rows: int, inner: tuple[int, ...] = (160, 64, 96)) -> dict[str, Any]:
    """The arguments of `decode_blocks`, blocks of several formats and feed-forward sizes."""
    blocks = [
        block_of(guards, dtype, formats, sizes=(96, 4, 2, 32, size), seed=seed)
        for seed, (formats, size) in enumerate(zip(FORMATS, inner, strict=True))
    ]
    given = [inputs_of(block, rows, dtype) for block in blocks]
    caches = {f"{name}_caches": [each[f"{name}_cache"] * (1 + i) for i, each in enumerate(given)] for name in "kv"}
    return {name: given[0][name] for name in ("x", "cos", "sin", "lengths")} | caches | {"blocks": blocks}


@each_dtype
@pytest.mark.parametrize("inner", [(160, 64, 96), (32, 64, 224)], ids=str)
def test_one_call_gives_what_a_call_a_block_gives(
    instruction_set: str, guards: Guards, dtype: torch.dtype, inner: tuple[int, ...]
) -> None:
    stack = stack_of(guards, dtype, 2, inner)
    copies = {name: [cache.clone() for cache in stack[name]] for name in ("k_caches", "v_caches")}
    with ops.use_backend("cpu"):
        out = ops.decode_blocks(**stack)
        x = stack["x"]
        for i, block in enumerate(stack["blocks"]):
            own = {name: [copies[name][i]] for name in copies}
            x = ops.decode_blocks(**stack | own | {"x": x, "blocks": [block]})
    assert torch.equal(out, x)
    for name, caches in copies.items():
        for ours, theirs in zip(stack[name], caches, strict=True):
            assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


@pytest.mark.parametrize("format", ["plain", "int8", "fp8"])
def test_over_blocks_one_call_gives_what_a_call_a_block_gives(cpu: None, guards: Guards, format: str) -> None:
    stack = stack_of(guards, torch.float32, 2)
    pairs = [dict(k_cache=k, v_cache=v) for k, v in zip(stack["k_caches"], stack["v_caches"], strict=True)]
    rest = {name: stack[name] for name in ("x", "cos", "sin", "lengths")}
    made = [paged(rest | pair)[0] for pair in pairs]

    def caches_of(name: str) -> list[Any]:
        blocks = [each[name].nan_to_num() for each in made]
        return blocks if format == "plain" else [QuantizedBlocks(*quantize(x, CACHE_DTYPES[format])) for x in blocks]

    whole, each = ({f"{name}s": caches_of(name) for name in ("k_cache", "v_cache")} for _ in range(2))
    rest |= {"block_table": made[0]["block_table"]}
    out = ops.paged_decode_blocks(**rest, **whole, blocks=stack["blocks"])
    x = rest["x"]
    for i, block in enumerate(stack["blocks"]):
        x = ops.paged_decode_blocks(**rest | {"x": x}, blocks=[block], **{name: [each[name][i]] for name in each})
    assert torch.equal(out, x)
    for name, caches in each.items():
        for ours, theirs in zip(whole[name], caches, strict=True):
            if isinstance(ours, QuantizedBlocks):
                assert torch.equal(ours.scales, theirs.scales)
                ours, theirs = ours.values.view(torch.uint8), theirs.values.view(torch.uint8)
            assert torch.equal(ours, theirs)


def test_8_bit_caches_of_two_kinds_do_not_go_together(cpu: None, guards: Guards) -> None:
    stack = stack_of(guards, torch.float32, 2)
    rest = {name: stack[name] for name in ("x", "cos", "sin", "lengths")}
    made = paged(rest | {"k_cache": stack["k_caches"][0], "v_cache": stack["v_caches"][0]})[0]
    kinds = [QuantizedBlocks(*quantize(made["k_cache"].nan_to_num(), dtype)) for dtype in CACHE_DTYPES.values()]
    with pytest.raises(DeviceError, match="differ in their strides or dtypes"):
        ops.paged_decode_blocks(
            **rest, blocks=stack["blocks"][:2], k_caches=kinds, v_caches=kinds, block_table=made["block_table"]
        )


def test_several_blocks_that_do_not_go_together(cpu: None, guards: Guards) -> None:
    stack = stack_of(guards, torch.float32, 2)
    first, second, third = stack["blocks"]
    other_heads = block_of(guards, torch.float32, sizes=(96, 4, 4, 32, 160))
    wider = block_of(guards, torch.float32, sizes=(128, 4, 2, 32, 160))
    double = dataclasses.replace(second, input_norm=second.input_norm.double())
    gaps = torch.zeros(2, 2, 2 * SLOTS, 32)[:, :, ::2]
    for change, message in (
        ({"blocks": []}, "one block or more"),
        ({"blocks": [first, other_heads, third]}, "differ in their heads"),
        ({"blocks": [first, wider, third]}, r"x has shape \[2, 96\], and a block's weights"),
        ({"blocks": [first, double, third]}, "takes norms on the CPU in torch.float32"),
        ({"k_caches": stack["k_caches"][:2]}, r"there are \[2, 3\] caches; takes 3 of each"),
        ({"k_caches": [*stack["k_caches"][:2], gaps]}, "differ in their strides"),
        ({"v_caches": [*stack["v_caches"][:2], gaps.double()]}, "one is torch.float64"),
        ({"lengths": stack["lengths"][:1]}, "lengths has shape"),
        ({"sin": stack["sin"].double()}, "cos and sin have shapes"),
        ({"blocks": [first, second, dataclasses.replace(third, kv_heads=3)]}, "differ in their heads"),
        ({"blocks": [first, second, dataclasses.replace(third, input_norm=third.input_norm[:50])]}, "of 96 values"),
    ):
        with pytest.raises(DeviceError, match=message):
            ops.decode_blocks(**stack | change)
