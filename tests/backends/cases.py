"""Arguments for every op that has kernels, odd ones and those of real models: what tests/gpu runs on a device, and what
test_triton_aot.py compiles ahead of time for one.

Shapes: B rows · H query heads · Hkv key heads · T tokens · C slots · D head dim
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.ops import CACHE_DTYPES, KeyRanges, QuantizedBlocks, Span
from llama_multimodal.ops.quantized_blocks import quantize

from .references import TOLERANCE, poisoned, randn

Arguments = tuple[list[Any], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One call of an op.

    make: dtype and device → positional arguments. keywords: the others. wanted: the places of the arguments that a
    gradient is wanted of, where the op has a backward pass on every backend.
    """

    op: str
    title: str
    make: Callable[[torch.dtype, str], Sequence[Any]]
    keywords: tuple[tuple[str, Any], ...] = ()
    wanted: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.op}: {self.title}"

    def arguments(self, dtype: torch.dtype, device: str) -> Arguments:
        args = [x.to(device) if isinstance(x, Tensor) else x for x in self.make(dtype, device)]
        for place in self.wanted:
            args[place].requires_grad_()
        return args, dict(self.keywords)


def run(op: str, args: Sequence[Any], keywords: dict[str, Any]) -> list[Tensor]:
    """What an op gives; for one that writes, the caches that it wrote to, 8 bits as whole numbers."""
    if op == "quantized_paged_decode_attention":
        q, k, v, k_scales, v_scales, *reads = args
        return [ops.paged_decode_attention(q, QuantizedBlocks(k, k_scales), QuantizedBlocks(v, v_scales), *reads)]
    if op == "quantized_kv_write":
        k, v, k_cache, v_cache, k_scales, v_scales, slots = args
        ops.kv_write(k, v, QuantizedBlocks(k_cache, k_scales), QuantizedBlocks(v_cache, v_scales), slots)
        return [k_cache.view(torch.int8), v_cache.view(torch.int8), k_scales, v_scales]
    given = getattr(ops, op)(*args, **keywords)
    return list(args[2:4]) if op == "kv_write" else list(given) if isinstance(given, tuple) else [given]


def run_with_gradients(case: Case, args: Sequence[Any], keywords: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """An op's outputs, and the gradients that a case wants, from output gradients that differ element by element."""
    outputs = run(case.op, args, keywords)
    if not case.wanted:
        return outputs, []
    seeds = [_seed(x.shape, x.dtype, x.device) for x in outputs]
    return outputs, list(torch.autograd.grad(outputs, [args[place] for place in case.wanted], seeds))


@functools.cache
def _seed(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An output's gradient, of values that every dtype holds; kept, since a CUDA graph copies nothing from the host."""
    return randn(*shape, dtype=torch.bfloat16, seed=7).to(device, dtype)


def widened(args: Sequence[Any]) -> list[Any]:
    """The same values in fp64, for the reference to compute with."""

    def is_float(x: Any) -> bool:  # 8 bits are values of a cache, which stay what they are
        return isinstance(x, Tensor) and x.is_floating_point() and x.itemsize > 1

    return [x.detach().double().requires_grad_(x.requires_grad) if is_float(x) else x for x in args]


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """An op's outputs and gradients against the reference's on the same device, computed in fp64 from equal values."""
    args, keywords = case.arguments(dtype, device)
    wide = widened(args)
    ours, our_gradients = run_with_gradients(case, args, keywords)
    with ops.use_backend("torch"):
        expected, gradients = run_with_gradients(case, wide, keywords)
    assert len(our_gradients) == len(gradients) == len(case.wanted)
    for got, want in zip([*ours, *our_gradients], [*expected, *gradients], strict=True):
        near(got, want, dtype)


def near(ours: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    """Every element, within the dtype's tolerance, of the largest value where those are sums of many."""
    assert ours.shape == reference.shape
    tolerance = 2 * TOLERANCE[dtype]
    largest = max(1.0, float(reference.detach().abs().max()))
    torch.testing.assert_close(ours.double(), reference.double(), rtol=tolerance, atol=tolerance * largest)


def some_ranges(rows: int, tokens: int, keys: int, device: str) -> KeyRanges:
    """Runs of a few tokens that read something, overlapping or not, or nothing."""
    generator = torch.Generator().manual_seed(rows + tokens + keys)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    spans, table = [], torch.zeros(rows, tokens, 2, dtype=torch.int32)
    for row in range(rows):
        t = 0
        while t < tokens:
            first = pick(0, keys)
            last, end = pick(first, keys), min(tokens, t + pick(1, 9))
            if pick(0, 3):
                table[row, t:end] = torch.tensor((first, last))  # an empty range somewhere reads nothing, too
                if last > first:
                    spans.append(Span(row, t, end, first, last))
            t = end
    return KeyRanges(tuple(spans), table.to(device))


def some_lengths(rows: int, slots: int, device: str) -> Tensor:
    """A full row, an empty one, and others between."""
    lengths = torch.randint(0, slots + 1, (rows,), generator=torch.Generator().manual_seed(rows), dtype=torch.int32)
    lengths[0] = slots
    if rows > 1:
        lengths[1] = 0
    return lengths.to(device)


# --- norms, rotation, gates ------------------------------------------------------------------------------------------


def _norm(*shape: int, swapped: bool = False) -> Callable[[torch.dtype, str], Sequence[Any]]:
    def make(dtype: torch.dtype, device: str) -> Sequence[Any]:
        x = randn(*shape, dtype=dtype)
        return 3 * (x.transpose(1, 2) if swapped else x), 1 + randn(shape[-1], dtype=dtype, seed=1) / 4, 1e-5

    return make


def _add_norm(*shape: int) -> Callable[[torch.dtype, str], Sequence[Any]]:
    def make(dtype: torch.dtype, device: str) -> Sequence[Any]:
        x, residual = (randn(*shape, dtype=dtype, seed=seed) for seed in (2, 3))
        return x, residual, 1 + randn(shape[-1], dtype=dtype, seed=1) / 4, 1e-5

    return make


def _rope(b: int, h: int, kv: int, t: int, d: int, *, table: bool) -> Callable[[torch.dtype, str], Sequence[Any]]:
    def make(dtype: torch.dtype, device: str) -> Sequence[Any]:
        q = randn(b, t, h, d, dtype=dtype).transpose(1, 2)
        k = randn(b, kv, t, d, dtype=dtype, seed=1)
        angles = 3 * randn(*((9, d // 2) if table else (b, t, d // 2)), seed=5)
        positions = torch.randint(0, 9, (b, t), generator=torch.Generator().manual_seed(t)) if table else None
        return q, k, angles.cos(), angles.sin(), positions

    return make


def _gate(*shape: int, packed: bool) -> Callable[[torch.dtype, str], Sequence[Any]]:
    def make(dtype: torch.dtype, device: str) -> Sequence[Any]:
        gate, up = 3 * randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
        return (torch.cat((gate, up), dim=-1),) if packed else (gate, up)

    return make


def _linear_gelu(*shape: int, n: int, bias: bool, kind: str) -> Callable[[torch.dtype, str], Sequence[Any]]:
    def make(dtype: torch.dtype, device: str) -> Sequence[Any]:
        x, weight = randn(*shape, dtype=dtype), randn(n, shape[-1], dtype=dtype, seed=1) / shape[-1] ** 0.5
        return x, weight, randn(n, dtype=dtype, seed=2) if bias else None, kind

    return make


# --- attention -------------------------------------------------------------------------------------------------------


def _decode(b: int, h: int, kv: int, c: int, d: int, *, bias: bool = False) -> Callable[[torch.dtype, str], Any]:
    def make(dtype: torch.dtype, device: str) -> Sequence[Any]:
        q = randn(b, h, d, dtype=dtype)
        k = poisoned(randn(b, kv, c, d, dtype=dtype, seed=1).to(device))
        v = randn(b, c, kv, d, dtype=dtype, seed=2).transpose(1, 2)
        lengths = some_lengths(b, c, device)
        if not bias:
            return q, k, v, lengths
        counts = torch.randint(1, 5000, (c,), generator=torch.Generator().manual_seed(c)).float().log()
        counts[c // 2] = -math.inf
        lengths[lengths == c // 2 + 1] -= 1  # no row whose only key is hidden
        return q, k, v, lengths, counts

    return make


def _paged(h: int, kv: int, slots: int, d: int) -> Callable[[torch.dtype, str], Any]:
    """Four rows of up to five blocks, with table entries past a row's length that name no block."""

    def make(dtype: torch.dtype, device: str) -> Sequence[Any]:
        lengths = torch.tensor([4 * slots + 1, slots, 0, 1], dtype=torch.int32)
        table = torch.randperm(20, generator=torch.Generator().manual_seed(slots)).view(4, 5).to(torch.int32)
        table[torch.arange(5) * slots >= lengths[:, None]] = 99
        caches = (randn(20, slots, kv, d, dtype=dtype, seed=seed) for seed in (1, 2))
        return randn(4, h, d, dtype=dtype), *caches, table, lengths

    return make


def _quantized(h: int, kv: int, slots: int, d: int, format: str) -> Callable[[torch.dtype, str], Any]:
    """`_paged` over the same caches in 8 bits."""

    def make(dtype: torch.dtype, device: str) -> Sequence[Any]:
        q, *caches, table, lengths = _paged(h, kv, slots, d)(dtype, device)
        (k, k_scales), (v, v_scales) = (quantize(cache, CACHE_DTYPES[format]) for cache in caches)
        return q, k, v, k_scales, v_scales, table, lengths

    return make


def _write(t: int, kv: int, slots: int, d: int) -> Callable[[torch.dtype, str], Any]:
    """Tokens in any order, every fifth of them padding."""

    def make(dtype: torch.dtype, device: str) -> Sequence[Any]:
        k, v = randn(kv, t, d, dtype=dtype).transpose(0, 1), poisoned(randn(t, kv, d, dtype=dtype, seed=1).to(device))
        blocks = -(-t // slots) + 1
        caches = (torch.full((blocks, slots, kv, d), 7.0, dtype=dtype) for _ in range(2))
        where = torch.randperm(blocks * slots, generator=torch.Generator().manual_seed(t))[:t]
        where[::5] = -1
        return k, v, *caches, where

    return make


def _write_in_8_bits(t: int, kv: int, slots: int, d: int, format: str) -> Callable[[torch.dtype, str], Any]:
    """`_write` into caches in 8 bits, of tokens of many sizes."""

    def make(dtype: torch.dtype, device: str) -> Sequence[Any]:
        k, v, *caches, where = _write(t, kv, slots, d)(dtype, device)
        sizes = 10 ** torch.linspace(-3, 3, t)[:, None, None]
        values, scales = ([x, x.clone()] for x in quantize(caches[0], CACHE_DTYPES[format]))
        return (k * sizes).to(dtype), v, *values, *scales, where

    return make


def _cross(b: int, h: int, kv: int, t: int, s: int, d: int) -> Callable[[torch.dtype, str], Any]:
    def make(dtype: torch.dtype, device: str) -> Sequence[Any]:
        q = randn(b, t, h, d, dtype=dtype).transpose(1, 2)
        k, v = randn(s, kv, d, dtype=dtype, seed=1).transpose(0, 1), randn(kv, s, d, dtype=dtype, seed=2)
        return q, k, v, some_ranges(b, t, s, device)

    return make


# --- weights ---------------------------------------------------------------------------------------------------------


def _packed(*rows: int, n: int, k: int, format: str, group: int = 32, symmetric: bool = True, bias: bool = False):
    def make(dtype: torch.dtype, device: str) -> Sequence[Any]:
        weight = (randn(n, k, seed=1).to(device) + 0.3) / k**0.5
        packed = ops.pack_weight(weight, format, group=group, symmetric=symmetric)
        return randn(*rows, k, dtype=dtype), packed, randn(n, dtype=dtype, seed=2) if bias else None

    return make


def _loss(t: int, e: int, v: int) -> Callable[[torch.dtype, str], Any]:
    def make(dtype: torch.dtype, device: str) -> Sequence[Any]:
        labels = torch.randint(0, v, (t,), generator=torch.Generator().manual_seed(t))
        labels[1::4] = -100
        return randn(t, e, dtype=dtype) / e**0.5, 2 * randn(v, e, dtype=dtype, seed=1), labels

    return make


CASES = [
    Case("rms_norm", "odd", _norm(3, 5, 33), wanted=(0, 1)),
    Case("rms_norm", "transposed heads", _norm(2, 5, 3, 8, swapped=True), wanted=(0, 1)),
    Case("rms_norm", "4096 columns", _norm(300, 4096), wanted=(0, 1)),
    Case("rms_norm", "a long row", _norm(3, 8195)),
    Case("add_rms_norm", "odd", _add_norm(37, 129), wanted=(0, 1, 2)),
    Case("add_rms_norm", "4096 columns", _add_norm(2, 40, 4096), wanted=(0, 1, 2)),
    Case("apply_rope", "halves", _rope(2, 4, 2, 7, 34, table=False), wanted=(0, 1)),
    Case("apply_rope", "halves, 64", _rope(2, 32, 8, 5, 64, table=False), wanted=(0, 1)),
    Case("apply_rope", "pairs, table", _rope(2, 32, 8, 5, 128, table=True), (("interleaved", True),), (0, 1)),
    Case("swiglu", "odd", _gate(2, 5, 33, packed=False), wanted=(0, 1)),
    Case("swiglu", "14336 columns, packed", _gate(5, 14336, packed=True), wanted=(0,)),
    Case("linear_gelu", "odd", _linear_gelu(2, 3, 9, n=37, bias=True, kind="none"), wanted=(0, 1, 2)),
    Case("linear_gelu", "tanh", _linear_gelu(65, 64, n=512, bias=True, kind="tanh")),
    Case("linear_gelu", "no bias", _linear_gelu(40, 9, n=37, bias=False, kind="none")),
    Case("decode_attention", "64", _decode(4, 32, 8, 300, 64)),
    Case("decode_attention", "80, key bias", _decode(3, 4, 2, 70, 80, bias=True)),
    Case("decode_attention", "96", _decode(3, 3, 3, 65, 96)),
    Case("decode_attention", "128, many keys", _decode(3, 32, 8, 4000, 128)),
    Case("paged_decode_attention", "64", _paged(6, 2, 4, 64)),
    Case("paged_decode_attention", "128", _paged(32, 8, 16, 128)),
    Case("quantized_paged_decode_attention", "64, int8", _quantized(6, 2, 4, 64, "int8")),
    Case("quantized_paged_decode_attention", "128, int8", _quantized(32, 8, 16, 128, "int8")),
    Case("quantized_paged_decode_attention", "64, fp8", _quantized(6, 2, 4, 64, "fp8")),
    Case("quantized_paged_decode_attention", "128, fp8", _quantized(32, 8, 16, 128, "fp8")),
    Case("kv_write", "80", _write(33, 2, 4, 80)),
    Case("kv_write", "128", _write(200, 8, 16, 128)),
    Case("quantized_kv_write", "80, int8", _write_in_8_bits(33, 2, 4, 80, "int8")),
    Case("quantized_kv_write", "80, fp8", _write_in_8_bits(33, 2, 4, 80, "fp8")),
    Case("quantized_kv_write", "128, int8", _write_in_8_bits(200, 8, 16, 128, "int8")),
    Case("quantized_kv_write", "128, fp8", _write_in_8_bits(200, 8, 16, 128, "fp8")),
    Case("cross_attention", "64", _cross(2, 4, 1, 33, 130, 64), wanted=(0, 1, 2)),
    Case("cross_attention", "80", _cross(2, 6, 2, 19, 40, 80), wanted=(0, 1, 2)),
    Case("cross_attention", "128", _cross(2, 32, 8, 60, 700, 128), wanted=(0, 1, 2)),
    Case("cross_attention", "one token", _cross(3, 32, 8, 1, 1601, 128)),
    Case("packed_linear", "int4", _packed(1, n=4096, k=2048, format="int4")),
    Case("packed_linear", "int4, 5 rows", _packed(5, n=70, k=256, format="int4", symmetric=False, bias=True)),
    Case("packed_linear", "int8", _packed(1, n=4096, k=2048, format="int8")),
    Case("packed_linear", "int8, 8 rows", _packed(2, 4, n=33, k=96, format="int8", group=48, bias=True)),
    Case("linear_cross_entropy", "odd", _loss(7, 5, 11), wanted=(0, 1)),
    Case("linear_cross_entropy", "sum", _loss(90, 64, 5000), (("reduction", "sum"),), (0, 1)),
]
