"""Cross-attention of few text tokens in CUDA C++ against fp64; what it leaves to others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.errors import DeviceError
from llama_multimodal.ops import KeyRanges, Span, _dispatch

from .. import references
from ..references import FLOATS, close, name_of, randn
from .conftest import Guards

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
SHAPES = [
    (1, 1, 1, 1, 1, 1), (4, 4, 2, 1, 90, 128), (2, 6, 2, 3, 40, 80), (2, 8, 1, 8, 33, 64), (3, 3, 3, 2, 70, 96),
    (1, 10, 1, 5, 30, 33),
]  # fmt: skip
"""rows, query heads, key heads, text tokens, vision tokens, head dim"""


def some_ranges(rows: int, tokens: int, keys: int) -> Tensor:
    """Ranges that overlap, of one key, of all keys, and of none."""
    generator = torch.Generator().manual_seed(rows + tokens + keys)
    table = torch.randint(0, keys + 1, (rows * tokens, 2), generator=generator).sort(1).values
    table[::3] = torch.tensor((0, keys))
    table[1::5] = 0
    table[2::7] = torch.tensor((keys - 1, keys))
    return table.view(rows, tokens, 2).to(torch.int32)


def some_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys as a model has them, heads inside of tokens."""
    b, h, kv, t, s, d = shape
    q = randn(b, t, h, d, dtype=dtype).transpose(1, 2)
    k = randn(s, kv, d, dtype=dtype, seed=1).transpose(0, 1)
    return q, k, randn(kv, s, d, dtype=dtype, seed=2)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_attention(dtype: torch.dtype, shape: tuple[int, ...], order: None, guards: Guards) -> None:
    q, k, v = (guards.input(x) for x in some_inputs(shape, dtype))
    table = guards.input(some_ranges(shape[0], shape[3], shape[4]))
    ours = ops.cross_attention(q, k, v, KeyRanges((), table))
    close(ours, references.cross_attention(q, k, v, table), dtype)
    assert not ours.transpose(1, 2)[table[..., 0] == table[..., 1]].any()
    assert ours.transpose(1, 2).is_contiguous()  # so that the projection behind it does not copy


@each_dtype
def test_a_long_range_in_splits(dtype: torch.dtype, order: None, guards: Guards) -> None:
    """Tokens whose ranges begin and end anywhere; nothing outside of them is read."""
    q, k, v = some_inputs((1, 4, 1, 2, 1500, 128), dtype)
    for x in (k, v):
        x[:, :37], x[:, 1301:] = torch.nan, torch.nan
    table = torch.tensor([[[37, 1301], [700, 703]]], dtype=torch.int32)
    q, k, v = (guards.input(x) for x in (q, k, v))
    close(ops.cross_attention(q, k, v, KeyRanges((), table)), references.cross_attention(q, k, v, table), dtype)


@pytest.mark.usefixtures("cuda")
def test_any_place_in_memory(guards: Guards) -> None:
    q = guards.input(randn(2, 4, 3, 16, 2))[..., 1]
    wide = guards.input(randn(9, 2, 32, seed=1)).transpose(0, 1)
    table = guards.input(some_ranges(3, 2, 9)).transpose(0, 1)
    for k in (wide[..., ::2], wide[..., :16], wide[..., 1:17], wide[:1, :, :16].expand(2, 9, 16)):
        for v in (k, wide[..., 16:]):
            ours = ops.cross_attention(q, k, v, KeyRanges((), table))
            close(ours, references.cross_attention(q, k, v, table), torch.float32)


@pytest.mark.usefixtures("cuda")
def test_ranges_end_with_the_keys() -> None:
    q, k, v = some_inputs((1, 2, 1, 3, 9, 16), torch.float32)
    past = torch.tensor([[[-5, 4], [7, 2**31 - 1], [6, 2]]], dtype=torch.int32)
    expected = references.cross_attention(q, k, v, torch.tensor([[[0, 4], [7, 9], [0, 0]]]))
    close(ops.cross_attention(q, k, v, KeyRanges((), past)), expected, torch.float32)


@pytest.mark.usefixtures("cuda")
def test_nothing_to_do() -> None:
    none = torch.zeros(1, 0, 16)
    ranges = KeyRanges((), torch.zeros(2, 3, 2, dtype=torch.int32))
    assert not ops.cross_attention(randn(2, 2, 3, 16), none, none, ranges).any()
    empty = ops.cross_attention(randn(0, 2, 1, 16), none, none, KeyRanges.of([], 0, 1))
    assert empty.shape == (0, 2, 1, 16)


def test_what_is_left_to_others(
    shim_library: Path, attach: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself, the dispatch takes the kernel for a step of decoding, and the reference for all else."""
    attach(shim_library)
    monkeypatch.setitem(_dispatch._AUTOMATIC, "cpu", ("cuda",))
    taken = []
    kernel = _dispatch._kernels["cross_attention", "cuda"]

    def counted(*args: Any) -> Tensor:
        taken.append(args)
        return kernel.function(*args)

    monkeypatch.setitem(_dispatch._kernels, ("cross_attention", "cuda"), dataclasses.replace(kernel, function=counted))
    for tokens, gradient in ((1, False), (8, False), (9, False), (1, True)):
        q, k, v = some_inputs((2, 4, 2, tokens, 20, 16), torch.float32)
        ranges = KeyRanges.of([Span(0, 0, 1, 3, 20), Span(1, 0, tokens, 0, 7)], 2, tokens)
        ours = ops.cross_attention(q.requires_grad_(gradient), k, v, ranges)
        close(ours.detach(), references.cross_attention(q.detach(), k, v, ranges.table), torch.float32)
    assert [args[0].shape[2] for args in taken] == [1, 8]


Q, K, TABLE = torch.zeros(2, 4, 3, 16), torch.zeros(2, 9, 16), torch.zeros(2, 3, 2, dtype=torch.int32)
REFUSED: list[tuple[dict[str, Tensor], str]] = [
    ({"q": Q[0]}, r"q has shape \[4, 3, 16\], k \[2, 9, 16\]; takes \[B, H, T, D\] and \[Hkv, S, D\]"),
    ({"v": K[:, :5]}, r"v has shape \[2, 5, 16\], k \[2, 9, 16\]; takes one shape"),
    ({"q": Q[..., :8]}, "q has head dim 8, k 16; takes one, of 128 at most"),
    ({"q": Q[:, :3]}, "q has 3 heads, k 2; takes a multiple"),
    ({"table": TABLE[:, :2]}, r"ranges.table is torch.int32 \[2, 2, 2\]; takes int32 \[B, T, 2\], here \[2, 3, 2\]"),
    ({"table": TABLE.long()}, r"ranges.table is torch.int64 \[2, 3, 2\]; takes int32"),
    ({"table": TABLE.to("meta")}, "ranges.table is on meta; takes cpu, where q is"),
    ({"k": K.half()}, "k is torch.float16, q torch.float32; takes one dtype"),
    ({"q": Q.clone().requires_grad_()}, "the kernel has no backward, and a gradient is wanted"),
]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("changed, message", REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(changed: dict[str, Tensor], message: str) -> None:
    q, k, v, table = ({"q": Q, "k": K, "v": K, "table": TABLE} | changed).values()
    with pytest.raises(DeviceError, match=f'cross_attention on backend "cuda": {message}'):
        ops.cross_attention(q, k, v, KeyRanges((), table))


@pytest.mark.usefixtures("cuda")
@each_dtype
@pytest.mark.parametrize("tokens", [1, 3])
def test_opcheck(dtype: torch.dtype, tokens: int) -> None:
    q, k, v = some_inputs((2, 4, 2, tokens, 9, 16), dtype)
    table = some_ranges(2, tokens, 9)
    torch.library.opcheck(torch.ops.llama_mm.cuda_cross_attention.default, (q, k, v, table))


@pytest.mark.usefixtures("cuda")
def test_a_compiled_graph_has_no_break() -> None:
    def merged(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return ops.cross_attention(q, k, v, KeyRanges((), table)).transpose(1, 2).flatten(2)

    torch._dynamo.reset()
    compiled = torch.compile(merged, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (2, 5):
        arguments = (*some_inputs((2, 4, 2, tokens, 9, 16), torch.float32), some_ranges(2, tokens, 9))
        torch.testing.assert_close(compiled(*arguments), merged(*arguments))
