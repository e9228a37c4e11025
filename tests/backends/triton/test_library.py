"""What the kernels share: the ops as torch sees them, what is refused and why, large offsets, torch.compile."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from backends.references import close, randn, rms_norm, swiglu
from llama_multimodal import ops
from llama_multimodal.errors import DeviceError
from llama_multimodal.ops import KeyRanges, _dispatch
from llama_multimodal.ops.backends import triton as backend
from llama_multimodal.ops.backends.triton import library
from llama_multimodal.ops.backends.triton.library import as_rows, empty_rows, order, power, tile
from llama_multimodal.ops.quantized_blocks import QuantizedBlocks, quantize

KERNELS = {
    "rms_norm", "add_rms_norm", "apply_rope", "swiglu", "linear_gelu", "decode_attention", "paged_decode_attention",
    "quantized_paged_decode_attention", "kv_write", "quantized_kv_write", "cross_attention", "packed_linear",
    "linear_cross_entropy",
}  # fmt: skip


def test_every_op_is_there() -> None:
    assert {op for op, backends in ops.available().items() if "triton" in backends} == KERNELS


# --- why the backend is not there ------------------------------------------------------------------------------------


def test_without_triton_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.knobs", None)
    assert "triton cannot be imported" in (backend.load() or "")


def test_without_a_gpu_or_the_interpreter_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = importlib.import_module("triton.knobs")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    assert backend.load() == "there is no GPU, and TRITON_INTERPRET=1 is not set"


def test_debugging_waits_for_each_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong while a kernel runs is known only after waiting for it."""

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nand what torch says of it")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=fail))
    kernel = importlib.import_module("llama_multimodal.ops.backends.triton.swiglu")._forward
    with pytest.raises(DeviceError, match=r"^swiglu_forward: CUDA error: an illegal memory access$"):
        library._wait(kernel)


# --- the ops as torch sees them --------------------------------------------------------------------------------------


def samples(device: str) -> dict[str, tuple[Any, ...]]:
    """Arguments for every op, strided where it matters, with gradients where there is a backward pass."""

    def leaf(*shape: int) -> Tensor:
        return randn(*shape, device=device).requires_grad_()

    def plain(*shape: int) -> Tensor:
        return randn(*shape, device=device)

    def whole(*values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    heads, cache, angles = leaf(1, 5, 3, 8).transpose(1, 2), plain(3, 4, 2, 8), plain(9, 4)
    table = whole(((0, 2), (0, 0), (1, 4), (1, 4), (0, 4)))[None]
    packed = ops.pack_weight(plain(6, 32), "int4", symmetric=False)
    values, scales = quantize(cache, torch.int8)  # opcheck compares by arithmetic that fp8 has none of
    return {
        "triton_rms_norm": (heads, leaf(8), 1e-5),
        "triton_add_rms_norm": (leaf(3, 8), leaf(3, 8), leaf(8), 1e-5),
        "triton_rms_norm_backward": (plain(3, 8), plain(3, 8), plain(3, 8), plain(8), 1e-5),
        "triton_apply_rope": (heads, leaf(1, 1, 5, 8), angles, angles, whole(4, 0, 8, 2, 2)[None], True, False),
        "triton_swiglu": (leaf(3, 8), None),
        "triton_swiglu_backward": (plain(3, 4), plain(3, 8), None),
        "triton_linear_gelu": (leaf(3, 8), leaf(5, 8), leaf(5), "tanh"),
        "triton_decode_attention": (plain(2, 4, 8), plain(2, 2, 6, 8), plain(2, 2, 6, 8), whole(6, 1), plain(6)),
        "triton_range_attention": (plain(2, 4, 8), plain(2, 6, 8), plain(2, 6, 8), whole((0, 6), (2, 3))),
        "triton_paged_decode_attention": (plain(2, 4, 8), cache, cache, whole((0, 2), (1, 1)), whole(7, 2)),
        "triton_quantized_paged_decode_attention": (
            plain(2, 4, 8), values, values, scales, scales, whole((0, 2), (1, 1)), whole(7, 2)
        ),
        "triton_kv_write": (plain(2, 2, 8), plain(2, 2, 8), cache.clone(), cache.clone(), whole(5, -1)),
        "triton_quantized_kv_write": (
            plain(2, 2, 8), plain(2, 2, 8), values.clone(), values.clone(), scales.clone(), scales.clone(), whole(5, -1)
        ),
        "triton_cross_attention": (heads, leaf(1, 4, 8), leaf(1, 4, 8), table),
        "triton_packed_linear": (plain(2, 32), packed.values, packed.scales, packed.zeros, plain(6), 32),
        "triton_linear_cross_entropy": (leaf(3, 8), leaf(7, 8), whole(1, -100, 6), -100, True, True),
    }  # fmt: skip


@pytest.mark.parametrize("name", [
    "triton_rms_norm", "triton_add_rms_norm", "triton_rms_norm_backward", "triton_apply_rope", "triton_swiglu",
    "triton_swiglu_backward", "triton_linear_gelu", "triton_decode_attention", "triton_range_attention",
    "triton_paged_decode_attention", "triton_quantized_paged_decode_attention", "triton_kv_write",
    "triton_quantized_kv_write", "triton_cross_attention", "triton_packed_linear", "triton_linear_cross_entropy",
])  # fmt: skip
def test_opcheck(name: str, device: str) -> None:
    torch.library.opcheck(getattr(torch.ops.llama_mm, name).default, samples(device)[name])


def by_the_kernels(op: str, *args: Any, **kwargs: Any) -> Any:
    """What the dispatch runs once it has chosen."""
    kernel = _dispatch._kernels[op, "triton"]
    assert kernel.refuses(*args, **kwargs) is None
    return kernel.function(*args, **kwargs)


@pytest.mark.slow
def test_compiled_without_a_graph_break(device: str) -> None:
    """All ops with a backward pass in one graph, values and gradients; and the others in another."""
    x, weight = randn(2, 5, 3, 8, device=device).requires_grad_(), randn(8, seed=1, device=device).requires_grad_()
    cos, sin = randn(2, 5, 4, device=device), randn(2, 5, 4, seed=1, device=device)
    ranges = KeyRanges((), torch.tensor([0, 4], dtype=torch.int32, device=device).expand(2, 5, 2))
    labels = torch.arange(10, device=device) % 7

    def differentiable(x: Tensor, weight: Tensor) -> Tensor:
        normed, summed = by_the_kernels("add_rms_norm", by_the_kernels("rms_norm", x, weight, 1e-5), x, weight, 1e-5)
        q, k = by_the_kernels("apply_rope", normed.transpose(1, 2), summed.transpose(1, 2), cos, sin)
        seen = by_the_kernels("cross_attention", q, k[0, :, :4], k[1, :, :4], ranges)
        gated = by_the_kernels(
            "swiglu", seen.transpose(1, 2).flatten(2), by_the_kernels("swiglu", x.flatten(2).repeat(1, 1, 2))
        )
        hidden = by_the_kernels("linear_gelu", gated.flatten(0, 1), weight.repeat(6, 3), None)
        return by_the_kernels("linear_cross_entropy", hidden, weight.repeat(9)[:42].view(7, 6), labels)

    compiled = torch.compile(differentiable, fullgraph=True, backend="aot_eager")
    ours, expected = compiled(x, weight), differentiable(x, weight)
    torch.testing.assert_close(ours, expected)
    for got, want in zip(torch.autograd.grad(ours, (x, weight)), torch.autograd.grad(expected, (x, weight))):
        torch.testing.assert_close(got, want)

    packed = ops.pack_weight(randn(6, 32, device=device), "int8")

    def step(q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
        by_the_kernels("kv_write", q, q, cache, cache.clone(), slots)
        paged = by_the_kernels("paged_decode_attention", q, cache, cache, table, lengths)
        dense = by_the_kernels("decode_attention", q, cache.transpose(1, 2)[:2], cache.transpose(1, 2)[:2], lengths)
        return by_the_kernels("packed_linear", (paged + dense).view(1, 32), packed)

    def arguments() -> tuple[Tensor, ...]:
        table, lengths, slots = (torch.tensor(v, device=device) for v in ([[2, 0], [1, 3]], [4, 3], [9, 4]))
        return randn(2, 2, 8, device=device), randn(4, 4, 2, 8, device=device), table.int(), lengths.int(), slots

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments()), step(*arguments()))


@pytest.mark.slow
def test_prompts_of_other_lengths_need_no_other_graph(device: str) -> None:
    def layer(x: Tensor, weight: Tensor, wide: Tensor, cos: Tensor) -> Tensor:
        normed, summed = ops.add_rms_norm(ops.rms_norm(x, weight, 1e-5), x, weight, 1e-5)
        q = normed.unflatten(-1, (2, 8)).transpose(1, 2)
        q, _ = ops.apply_rope(q, q[:, :1], cos, cos)
        return summed + ops.swiglu(ops.linear_gelu(q.transpose(1, 2).flatten(2), wide, None, "tanh"))

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (3, 5, 9):
        x, cos = randn(2, tokens, 16, device=device), randn(2, tokens, 4, device=device)
        fixed = randn(16, device=device), randn(32, 16, device=device)
        torch.testing.assert_close(compiled(x, *fixed, cos), layer(x, *fixed, cos))
    assert counter.frame_count == 1


# --- what is refused -------------------------------------------------------------------------------------------------


def refusals(device: str) -> list[tuple[Callable[[], Any], str]]:
    def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def whole(*shape: int) -> Tensor:
        return x(*shape, dtype=torch.int32)

    def in_8_bits(k_scales: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        values, scales = x(3, 4, 1, 8, dtype=torch.int8), x(3, 4, 1)
        k = QuantizedBlocks(values, scales if k_scales is None else k_scales)
        v_cache = QuantizedBlocks(values if v is None else v, scales)
        return ops.paged_decode_attention(x(2, 2, 8), k, v_cache, whole(2, 2), whole(2))

    half = torch.float16
    ranges = KeyRanges((), whole(1, 2, 2))
    return [
        (lambda: ops.rms_norm(x(2, 8), x(4), 1e-5), r"weight has shape \(4,\); takes \[D\], the last axis"),
        (lambda: ops.rms_norm(x(2, 8), x(8, dtype=half), 1e-5), "weight is torch.float16, x torch.float32; takes one"),
        (lambda: ops.rms_norm(whole(2, 8), whole(8), 1e-5), "x is torch.int32; takes float32"),
        (lambda: ops.rms_norm(x(1, 8200).requires_grad_(), x(8200), 1e-5), "8200 columns; the backward"),
        (lambda: ops.add_rms_norm(x(2, 8), x(3, 8), x(8), 1e-5), r"residual has shape \(3, 8\); takes that of x"),
        (lambda: ops.swiglu(x(2, 7)), r"gate has shape \(2, 7\); takes \[..., F\] with up, or \[..., 2F\]"),
        (lambda: ops.swiglu(x(2, 8), x(2, 9)), r"up has shape \(2, 9\); takes that of gate"),
        (lambda: ops.linear_gelu(x(2, 8), x(5, 9), None), r"weight has shape \(5, 9\); takes \[N, K\]"),
        (lambda: ops.linear_gelu(x(2, 8), x(5, 8), x(4)), r"bias has shape \(4,\); takes \[N\] = \[5\]"),
        (lambda: ops.linear_gelu(x(2, 8), x(5, 8), None, "erf"), 'approximate is "erf"; takes "none" or "tanh"'),
        (lambda: ops.apply_rope(x(1, 2, 3, 5), x(1, 2, 3, 5), x(1, 3, 2), x(1, 3, 2)), r"\[B, Hkv, T, D\], D even"),
        (lambda: ops.apply_rope(x(1, 2, 3, 6), x(1, 2, 3, 6), x(1, 4, 3), x(1, 4, 3)), r"takes \[B, T, D/2\]"),
        (
            lambda: ops.apply_rope(x(1, 2, 3, 6), x(1, 2, 3, 6), x(9, 3), x(9, 3), whole(1, 4)),
            r"positions has shape \(1, 4\); takes \[B, T\] = \(1, 3\)",
        ),
        (
            lambda: ops.apply_rope(x(1, 2, 3, 6), x(1, 2, 3, 6), x(9, 3), x(9, 3), x(1, 3)),
            "positions is torch.float32; takes int32 or int64",
        ),
        (
            lambda: ops.apply_rope(x(1, 2, 3, 6), x(1, 2, 3, 6), x(1, 3, 3).requires_grad_(), x(1, 3, 3)),
            "the kernel gives none for angles",
        ),
        (lambda: ops.decode_attention(x(2, 3, 8), x(2, 2, 5, 8), x(2, 2, 5, 8), whole(2)), "3 heads, k 2; takes a"),
        (lambda: ops.decode_attention(x(2, 2, 8), x(2, 2, 5, 8), x(2, 2, 5, 8), whole(3)), r"lengths has shape \(3,\)"),
        (lambda: ops.decode_attention(x(2, 2, 8), x(2, 2, 5, 9), x(2, 2, 5, 9), whole(2)), "head dim 8, k 9; takes"),
        (
            lambda: ops.decode_attention(x(2, 2, 300), x(2, 2, 5, 300), x(2, 2, 5, 300), whole(2)),
            "head dim 300, k 300; takes one, of 256 at most",
        ),
        (
            lambda: ops.decode_attention(x(2, 2, 8), x(2, 2, 5, 8), x(2, 2, 5, 8), whole(2), x(4)),
            r"key_bias has shape \(4,\)",
        ),
        (
            lambda: ops.decode_attention(x(2, 2, 8).requires_grad_(), x(2, 2, 5, 8), x(2, 2, 5, 8), whole(2)),
            "the kernel has no backward",
        ),
        (
            lambda: ops.paged_decode_attention(x(2, 2, 8), x(3, 4, 1, 8), x(3, 4, 1, 8), whole(1, 2), whole(2)),
            r"block_table has shape \(1, 2\), lengths \(2,\); takes \[B, M\] and \[B\], B = 2",
        ),
        (lambda: in_8_bits(k_scales=x(3, 4, 2)), r"has scales torch.float32 \(3, 4, 2\); takes fp32 \[N, S, Hkv\]"),
        (lambda: in_8_bits(v=x(3, 4, 1, 8, dtype=torch.float8_e4m3fn)), "v_cache torch.float8_e4m3fn; takes int8 or"),
        (lambda: in_8_bits(v=x(3, 8, 1, 8, dtype=torch.int8)[:, ::2]), "takes contiguous caches on"),
        (
            lambda: ops.kv_write(x(2, 1, 8), x(2, 1, 8), x(3, 4, 1, 9), x(3, 4, 1, 9), whole(2)),
            r"takes \[T, Hkv, D\] for k_cache \(3, 4, 1, 9\)",
        ),
        (
            lambda: ops.kv_write(x(2, 1, 8), x(2, 1, 8), x(3, 8, 1, 8)[:, ::2], x(3, 4, 1, 8), whole(2)),
            "takes caches of one shape, both contiguous",
        ),
        (lambda: ops.cross_attention(x(1, 2, 3, 8), x(1, 4, 8), x(1, 4, 8), ranges), "ranges.table has shape"),
        (lambda: ops.cross_attention(x(1, 2, 2, 8), x(4, 8), x(4, 8), ranges), r"takes \[B, H, T, D\] and"),
        (lambda: ops.linear_cross_entropy(x(3, 8), x(7, 8), whole(4)), r"labels has shape \(4,\); takes \[T\] = \[3\]"),
        (
            lambda: ops.linear_cross_entropy(x(3, 8), x(7, 9), whole(3)),
            r"x has shape \(3, 8\), weight \(7, 9\); takes \[T, E\] and \[V, E\]",
        ),
    ]  # fmt: skip


def test_bad_input_is_named(device: str) -> None:
    for call, message in refusals(device):
        with pytest.raises(DeviceError, match=f'on backend "triton": .*{message}'):
            call()


# --- rows and blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3), (1, 2, 0, 3)], ids=str)
def test_rows_in_the_order_of_memory(axes: tuple[int, ...]) -> None:
    x = torch.arange(2.0 * 3 * 4 * 5).view(2, 3, 4, 5).permute(axes)
    rows = as_rows(x, order(x))
    assert rows.data_ptr() == x.data_ptr() and rows.stride() == (5, 1)
    out = empty_rows(x, order(x))
    out.copy_(x)
    assert out.stride() == x.stride()
    assert torch.equal(as_rows(out, order(x)), rows)


def test_rows_of_a_slice_are_a_view() -> None:
    gate, up = torch.randn(2, 3, 10).chunk(2, dim=-1)
    for half in (gate, up):
        rows = as_rows(half, order(half))
        assert rows.data_ptr() == half.data_ptr() and rows.stride() == (10, 1) and rows.shape == (6, 5)


def test_blocks_cover_what_they_must() -> None:
    for rows in (1, 2, 5, 64, 1000):
        for columns in (1, 3, 64, 129, 4096, 9000):
            height, width, warps = tile(rows, columns, 2048, 8192)
            assert width in (min(power(columns), 8192), 8192) and height & (height - 1) == 0
            assert 1 <= warps <= 16 and (height == 1 or height * width <= 2048)


@pytest.mark.parametrize("op", ["swiglu", "rms_norm", "kv_write"])
def test_offsets_past_two_to_the_31(op: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows two thousand million values apart, in memory that is asked for but, but for a few pages, never touched."""
    if device == "cpu":
        # The interpreter would copy all of it onto itself; it works on CPU tensors in place.
        interpreter = importlib.import_module("triton.runtime.interpreter")
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = 2**31 + 16
    base = torch.empty(far + 16, dtype=torch.float16, device=device)
    rows = base.as_strided((2, 8), (far, 1))
    values = randn(2, 8, dtype=torch.float16, device=device)
    rows.copy_(values)
    if op == "swiglu":
        close(ops.swiglu(rows, values), swiglu(values, values), torch.float16)
    elif op == "rms_norm":
        close(ops.rms_norm(rows, values[0], 1e-5), rms_norm(values, values[0], 1e-5), torch.float16)
    else:
        cache = base[: far // 8 * 8].view(-1, 1, 1, 8)
        slots = torch.tensor([0, cache.shape[0] - 1], device=device)
        ops.kv_write(values[:, None], values[:, None], cache, cache.view(-1, 1, 1, 8), slots)
        assert torch.equal(cache[slots].view(2, 8), values)
