"""What benchmarks/ops.py measures: calls of every op at the sizes of real models, and what each cannot do without.

Shapes: T tokens · B rows · H query heads · Hkv key heads · D head dim · C keys · K inputs · N outputs · V vocabulary
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.ops import CACHE_DTYPES, SCALE_BYTES, KeyRanges, PackedWeight, QuantizedBlocks, Span
from llama_multimodal.ops.quantized_blocks import quantize

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Cost:
    """The least that a call moves and computes.

    bytes: what it reads, and what it writes, once each. operations: additions, multiplications, divisions and
    functions, one each. products: those of them in matrix products.
    """

    bytes: int
    operations: int
    products: int = 0

    def floor(self, bandwidth: float, peak: float) -> float:
        """Seconds on a device that moves `bandwidth` bytes and multiplies at `peak` operations a second."""
        return max(self.bytes / bandwidth, self.products / peak)


@dataclass(frozen=True)
class Row:
    """One op at one size. make: a device → fresh arguments; eager: what to compare with, if not the op's reference.

    wanted: the arguments whose gradients are taken in the same run, with an output gradient of ones. dtype: what
    matrix products multiply.
    """

    op: str
    title: str
    cost: Cost
    make: Callable[[str], list[Any]]
    keywords: tuple[tuple[str, Any], ...] = ()
    wanted: tuple[int, ...] = ()
    eager: Callable[..., Any] | None = None
    dtype: torch.dtype = BF16

    @property
    def name(self) -> str:
        return f"{self.op}, {self.title}"


def _random(*shape: int, dtype: torch.dtype, device: str, wanted: bool = False) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device).requires_grad_(wanted)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _kind(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP32: "fp32"}[dtype]


# --- norms, rotation, gates ------------------------------------------------------------------------------------------


def rms_norm(t: int, d: int, dtype: torch.dtype = BF16, training: bool = False, note: str = "") -> Row:
    passes, operations = (5, 14) if training else (2, 4)
    return Row(
        "rms_norm",
        f"{t} x {d} {_kind(dtype)}{' forward and backward' if training else ''}{note}",
        Cost(passes * t * d * dtype.itemsize, operations * t * d),
        lambda device: [
            _random(t, d, dtype=dtype, device=device, wanted=training),
            _random(d, dtype=dtype, device=device, wanted=training),
            1e-5,
        ],
        wanted=(0, 1) if training else (),
    )


def add_rms_norm(t: int, d: int) -> Row:
    return Row(
        "add_rms_norm",
        f"{t} x {d} bf16",
        Cost(4 * t * d * 2, 5 * t * d),
        lambda device: [_random(*shape, dtype=BF16, device=device) for shape in ((t, d), (t, d), (d,))] + [1e-5],
    )


def apply_rope(
    t: int, h: int, kv: int, d: int, dtype: torch.dtype = BF16, training: bool = False, note: str = ""
) -> Row:
    values = t * (h + kv) * d
    times = 2 if training else 1

    def make(device: str) -> list[Any]:
        q, k = (_random(1, t, heads, d, dtype=dtype, device=device).transpose(1, 2) for heads in (h, kv))
        angles = _random(1, t, d // 2, dtype=FP32, device=device)
        return [q.requires_grad_(training), k.requires_grad_(training), angles.cos(), angles.sin()]

    return Row(
        "apply_rope",
        f"{t} tokens, {h} + {kv} heads of {d} {_kind(dtype)}{' forward and backward' if training else ''}{note}",
        Cost(times * (2 * values * dtype.itemsize + t * d * 4), times * 3 * values),
        make,
        wanted=(0, 1) if training else (),
    )


def swiglu(t: int, f: int, dtype: torch.dtype = BF16, training: bool = False, note: str = "") -> Row:
    passes, operations = (8, 17) if training else (3, 5)
    return Row(
        "swiglu",
        f"{t} x {f} {_kind(dtype)}{' forward and backward' if training else ''}{note}",
        Cost(passes * t * f * dtype.itemsize, operations * t * f),
        lambda device: [_random(t, f, dtype=dtype, device=device, wanted=training) for _ in range(2)],
        wanted=(0, 1) if training else (),
    )


def linear_gelu(t: int, k: int, n: int) -> Row:
    return Row(
        "linear_gelu",
        f"{t} x {k} by {n} x {k} bf16",
        Cost((t * k + n * k + n + t * n) * 2, 2 * t * n * k + 10 * t * n, 2 * t * n * k),
        lambda device: [_random(*shape, dtype=BF16, device=device) / k**0.25 for shape in ((t, k), (n, k), (n,))],
    )


# --- attention -------------------------------------------------------------------------------------------------------


def decode_attention(b: int, h: int, kv: int, c: int, d: int) -> Row:
    return Row(
        "decode_attention",
        f"{_count(b, 'row')}, {h}/{kv} heads of {d}, {c} keys bf16",
        Cost((2 * b * kv * c * d + 2 * b * h * d) * 2, 4 * b * h * c * d, 4 * b * h * c * d),
        lambda device: [
            *(_random(*shape, dtype=BF16, device=device) for shape in ((b, h, d), (b, kv, c, d), (b, kv, c, d))),
            torch.full((b,), c, dtype=torch.int32, device=device),
        ],
    )


def paged_decode_attention(b: int, h: int, kv: int, c: int, d: int, slots: int = 16) -> Row:
    blocks = b * c // slots

    def make(device: str) -> list[Any]:
        caches = [_random(blocks, slots, kv, d, dtype=BF16, device=device) for _ in range(2)]
        table = torch.randperm(blocks, dtype=torch.int32, device=device).view(b, -1)
        lengths = torch.full((b,), c, dtype=torch.int32, device=device)
        return [_random(b, h, d, dtype=BF16, device=device), *caches, table, lengths]

    return Row(
        "paged_decode_attention",
        f"{_count(b, 'row')}, {h}/{kv} heads of {d}, {c} keys in blocks of {slots} bf16",
        Cost((2 * b * kv * c * d + 2 * b * h * d) * 2 + 4 * blocks, 4 * b * h * c * d, 4 * b * h * c * d),
        make,
    )


def quantized_paged_decode_attention(b: int, h: int, kv: int, c: int, d: int, format: str, slots: int = 16) -> Row:
    blocks = b * c // slots

    def make(device: str) -> list[Any]:
        q, *caches, table, lengths = paged_decode_attention(b, h, kv, c, d, slots).make(device)
        (k, k_scales), (v, v_scales) = (quantize(cache, CACHE_DTYPES[format]) for cache in caches)
        return [q, k, v, k_scales, v_scales, table, lengths]

    return Row(
        "quantized_paged_decode_attention",
        f"{_count(b, 'row')}, {h}/{kv} heads of {d}, {c} keys in blocks of {slots}, {format} bf16",
        Cost(2 * b * kv * c * (d + SCALE_BYTES) + 4 * b * h * d + 4 * blocks, 4 * b * h * c * d, 4 * b * h * c * d),
        make,
    )


def _over_8_bits(q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor, v_scales: Tensor, *reads: Tensor) -> Tensor:
    return ops.paged_decode_attention(q, QuantizedBlocks(k, k_scales), QuantizedBlocks(v, v_scales), *reads)


def kv_write(t: int, kv: int, d: int, slots: int = 16) -> Row:
    def make(device: str) -> list[Any]:
        new = [_random(t, kv, d, dtype=BF16, device=device) for _ in range(2)]
        caches = [_random(t // slots, slots, kv, d, dtype=BF16, device=device) for _ in range(2)]
        return [*new, *caches, torch.randperm(t, device=device)]

    return Row("kv_write", f"{t} tokens, {kv} heads of {d} bf16", Cost(8 * t * kv * d + 8 * t, 0), make)


def quantized_kv_write(t: int, kv: int, d: int, format: str, slots: int = 16) -> Row:
    def make(device: str) -> list[Any]:
        *new, k_cache, v_cache, where = kv_write(t, kv, d, slots).make(device)
        (k, k_scales), (v, v_scales) = (quantize(cache, CACHE_DTYPES[format]) for cache in (k_cache, v_cache))
        return [*new, k, v, k_scales, v_scales, where]

    cost = Cost(4 * t * kv * d + 2 * t * kv * (d + SCALE_BYTES) + 8 * t, 0)
    return Row("quantized_kv_write", f"{t} tokens, {kv} heads of {d}, {format} bf16", cost, make)


def _write_8_bits(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scales: Tensor, v_scales: Tensor, slots: Tensor
) -> None:
    ops.kv_write(k, v, QuantizedBlocks(k_cache, k_scales), QuantizedBlocks(v_cache, v_scales), slots)


def cross_attention(t: int, h: int, kv: int, s: int, d: int) -> Row:
    def make(device: str) -> list[Any]:
        q = _random(1, t, h, d, dtype=BF16, device=device).transpose(1, 2)
        k, v = (_random(kv, s, d, dtype=BF16, device=device) for _ in range(2))
        return [q, k, v, KeyRanges.of([Span(0, 0, t, 0, s)], 1, t, device)]

    return Row(
        "cross_attention",
        f"{_count(t, 'token')}, {h}/{kv} heads of {d}, {s} vision tokens bf16",
        Cost((2 * kv * s * d + 2 * t * h * d) * 2, 4 * t * h * s * d, 4 * t * h * s * d),
        make,
    )


def attention(t: int, h: int, kv: int, d: int, note: str = "") -> Row:
    """Prefill, which torch computes; in eager torch as written out, keys and values repeated for each query head."""

    def written_out(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        k, v = (x.repeat_interleave(h // kv, dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(d)
        hidden = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v

    return Row(
        "attention",
        f"{t} tokens, {h}/{kv} heads of {d} fp32, causal{note}",
        Cost((2 * t * h * d + 2 * t * kv * d) * 4, 2 * t * t * h * d, 2 * t * t * h * d),
        lambda device: [_random(1, heads, t, d, dtype=FP32, device=device) for heads in (h, kv, kv)],
        (("causal", True),),
        eager=written_out,
        dtype=FP32,
    )


# --- weights ---------------------------------------------------------------------------------------------------------


def packed_linear(t: int, n: int, k: int, format: str, group: int = 32) -> Row:
    bits = {"int8": 8, "int4": 4}[format]
    kind = {"int8": torch.int8, "int4": torch.uint8}[format]

    def make(device: str) -> list[Any]:
        low, high = (-127, 128) if format == "int8" else (0, 256)
        values = torch.randint(low, high, (n, k * bits // 8), device=device).to(kind)
        scales = (torch.rand(n, k // group, device=device) / (2**bits * k**0.5)).half()
        packed = PackedWeight(format, (n, k), values, scales, None, group)  # type: ignore[arg-type]
        return [_random(t, k, dtype=BF16, device=device), packed]

    nbytes = n * k * bits // 8 + n * k // group * 2 + t * (n + k) * 2
    return Row(
        "packed_linear",
        f"{format} {n} x {k}, {_count(t, 'row')} bf16",
        Cost(nbytes, 2 * t * n * k, 2 * t * n * k),
        make,
    )


def linear_cross_entropy(t: int, e: int, v: int) -> Row:
    def logits_at_once(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), labels)

    return Row(
        "linear_cross_entropy",
        f"{t} x {e}, {v} classes bf16 forward and backward",
        Cost(2 * (t * e + v * e) * 2, 6 * t * e * v + 6 * t * v, 6 * t * e * v),
        lambda device: [
            _random(t, e, dtype=BF16, device=device, wanted=True),
            (_random(v, e, dtype=BF16, device=device) / e**0.5).requires_grad_(),
            torch.randint(0, v, (t,), device=device),
        ],
        wanted=(0, 1),
        eager=logits_at_once,
    )


README = ", as in the original README"
ROWS: Sequence[Row] = (
    rms_norm(32, 4096, FP32, note=README),
    apply_rope(2048, 32, 8, 128, FP32, note=README),
    attention(512, 32, 8, 128, note=README),
    swiglu(1024, 14336, FP32, note=README),
    decode_attention(1, 32, 8, 4096, 128),
    decode_attention(1, 32, 8, 32768, 128),
    decode_attention(16, 32, 8, 8192, 128),
    decode_attention(4, 32, 8, 16384, 64),
    packed_linear(1, 4096, 14336, "int4"),
    packed_linear(8, 4096, 14336, "int4"),
    packed_linear(1, 4096, 14336, "int8"),
    rms_norm(1024, 4096),
    rms_norm(16384, 4096),
    add_rms_norm(512, 4096),
    add_rms_norm(8192, 4096),
    apply_rope(1024, 32, 8, 128),
    apply_rope(8192, 32, 8, 128),
    swiglu(256, 14336),
    swiglu(2048, 14336),
    paged_decode_attention(16, 32, 8, 8192, 128),
    quantized_paged_decode_attention(16, 32, 8, 8192, 128, "int8"),
    kv_write(2048, 8, 128),
    kv_write(32768, 8, 128),
    quantized_kv_write(32768, 8, 128, "int8"),
    cross_attention(1, 32, 8, 6404, 128),
    cross_attention(512, 32, 8, 6404, 128),
    linear_gelu(6404, 1280, 5120),
    rms_norm(8192, 4096, training=True),
    apply_rope(4096, 32, 8, 128, training=True),
    swiglu(2048, 14336, training=True),
    linear_cross_entropy(2048, 4096, 128256),
)
"""Llama 3.2 Vision 11B's sizes; from 16 MB of traffic up, but for the first. The first are those with a target."""

TINY: Sequence[Row] = (
    rms_norm(3, 64, FP32, note=README),
    rms_norm(3, 64, training=True),
    add_rms_norm(3, 64),
    apply_rope(5, 4, 2, 16, training=True),
    swiglu(3, 64, training=True),
    linear_gelu(5, 16, 24),
    attention(9, 4, 2, 16),
    decode_attention(2, 4, 2, 40, 64),
    paged_decode_attention(2, 4, 2, 32, 64),
    quantized_paged_decode_attention(2, 4, 2, 32, 64, "int8"),
    kv_write(32, 2, 16),
    quantized_kv_write(32, 2, 16, "int8"),
    cross_attention(1, 4, 2, 11, 16),
    cross_attention(7, 4, 2, 11, 16),
    packed_linear(1, 16, 64, "int4"),
    packed_linear(2, 16, 64, "int8"),
    linear_cross_entropy(6, 16, 40),
)
"""For a look at whether all of it runs, on any machine."""


@functools.cache
def _ones(*facts: Any) -> Tensor:
    shape, dtype, device = facts
    return torch.ones(shape, dtype=dtype, device=device)


def run(row: Row, function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """A call, with its gradients where the row wants them."""
    if not row.wanted:
        with torch.no_grad():
            given = function(*args, **dict(row.keywords))
        return args[2:-1] if row.op.endswith("kv_write") else given
    with torch.enable_grad():
        given = function(*args, **dict(row.keywords))
        outputs = given if isinstance(given, tuple) else (given,)
        ones = [_ones(x.shape, x.dtype, x.device) for x in outputs]
        return given, torch.autograd.grad(outputs, [args[place] for place in row.wanted], ones)


def reference(row: Row, compiled: Callable[..., Any] = lambda function: function) -> Callable[..., Any]:
    """The op as eager torch computes it, or as what is made of that by a compiler."""
    if row.eager is not None:
        return compiled(row.eager)
    return on_backend(row, "torch", compiled)


_BY_PLAIN_NAMES = {"quantized_paged_decode_attention": _over_8_bits, "quantized_kv_write": _write_8_bits}
"""Ops that are called by the plain one's name."""


def on_backend(row: Row, backend: str, compiled: Callable[..., Any] = lambda function: function) -> Callable[..., Any]:
    function = compiled(_BY_PLAIN_NAMES.get(row.op) or getattr(ops, row.op))

    def forced(*args: Any, **keywords: Any) -> Any:
        with ops.use_backend(backend):
            return function(*args, **keywords)

    return forced


def by_liger(op: str) -> Callable[..., Any]:
    """The same op of Liger-Kernel.

    Raises:
        ImportError: it is not installed, or has no such op.
    """
    from liger_kernel.transformers import functional as liger

    doubled = functools.cache(lambda x: torch.cat((x, x), dim=-1))  # as its callers keep angles, once for all layers

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:  # q and k are turned in place
        return liger.liger_rope(q, k, doubled(cos), doubled(sin))

    functions = {
        "rms_norm": liger.liger_rms_norm,
        "add_rms_norm": liger.liger_fused_add_rms_norm,
        "swiglu": liger.liger_swiglu,
        "apply_rope": rope,
        "linear_cross_entropy": liger.liger_fused_linear_cross_entropy,
    }
    if op not in functions:
        raise ImportError(f"Liger-Kernel has no {op}")
    return functions[op]
