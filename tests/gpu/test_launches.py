"""How kernels are launched: in CUDA graphs, on the current stream, and with errors that surface where they arise."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends.cases import CASES, Case, near, run, run_with_gradients
from backends.references import randn
from torch import Tensor

from llama_multimodal import ops

from .test_ops import skip_where_refused


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of what `run` launches, and the outputs that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # first, what happens once only: compilers, handles
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs


@torch.no_grad()
def change(args: list[Any]) -> None:
    """Other values in the same memory."""
    for x in args:
        if isinstance(x, Tensor) and x.is_floating_point():
            x.mul_(-0.75)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_launch_can_be_captured(case: Case, backend: str) -> None:
    """Forward and backward; a replay over other values gives what a call gives."""
    skip_where_refused(case, backend, torch.bfloat16)
    args, keywords = case.arguments(torch.bfloat16, "cuda")
    graph, (outputs, gradients) = captured(lambda: run_with_gradients(case, args, keywords))
    before = [x.detach().clone() for x in (*outputs, *gradients)]
    change(args)
    graph.replay()
    replayed = [x.detach().clone() for x in (*outputs, *gradients)]
    again = run_with_gradients(case, args, keywords)
    for old, ours, expected in zip(before, replayed, [*again[0], *again[1]], strict=True):
        near(ours, expected, torch.bfloat16)
        assert not torch.equal(old, ours)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_run_on_the_current_stream(case: Case, backend: str) -> None:
    """Behind work that holds another stream up for a while: a launch elsewhere would read values not yet there."""
    skip_where_refused(case, backend, torch.bfloat16)
    args, keywords = case.arguments(torch.bfloat16, "cuda")
    leaves = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]
    kept = [x.detach().clone() for x in leaves]
    expected = [x.detach().clone() for x in run(case.op, args, keywords)]
    change(args)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # about 10 ms
        with torch.no_grad():
            for x, values in zip(leaves, kept):
                x.copy_(values)
        outputs = [x.detach().clone() for x in run(case.op, args, keywords)]
    torch.cuda.synchronize()
    for ours, wanted in zip(outputs, expected, strict=True):
        near(ours, wanted, torch.bfloat16)


# --- errors ----------------------------------------------------------------------------------------------------------

FAULT = """
import importlib, torch
from llama_multimodal.errors import DeviceError
from llama_multimodal.ops import _dispatch
assert _dispatch.why_missing("{backend}") is None
package = "llama_multimodal.ops.backends.{backend}"
library, swiglu = (importlib.import_module(package + name) for name in (".library", ".swiglu"))
x = torch.ones(4, 1024, device="cuda")
try:
    {launch}
    print("passed")
except DeviceError as error:
    print("at the op:", error)
try:
    torch.cuda.synchronize()
except Exception:
    print("later")
"""
LAUNCH = {  # rows a million million values apart, in memory that nobody has
    "cuda": "swiglu._launch(x.device, *[x.data_ptr()] * 3, 4, 1024, 2**40, 1024, 0)",
    "triton": "library.launch(swiglu._forward, 4, x, x, x, 4, 1024, 2**40, 1024,"
    " WIDE=library.WIDE[x.dtype], ROWS=1, BLOCK=1024)",
}


@pytest.mark.parametrize("debug", [True, False], ids=["LLAMA_MM_DEBUG=1", "without"])
def test_an_error_surfaces_at_its_op_when_debugging(debug: bool, backend: str) -> None:
    """In a process of its own: the device's context is lost with the error."""
    code = FAULT.format(backend=backend, launch=LAUNCH[backend])
    env = {**os.environ, "LLAMA_MM_DEBUG": "1" if debug else "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "later" in done.stdout, done.stdout + done.stderr
    assert ("at the op: swiglu" in done.stdout) == debug, done.stdout + done.stderr


# --- torch.compile ---------------------------------------------------------------------------------------------------


def decode_step(
    x: Tensor, weight: Tensor, projection: ops.PackedWeight, table: Tensor, caches: tuple[Tensor, Tensor],
    blocks: Tensor, lengths: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """What a decoder layer does with one token a row: all ops of decoding; x: [B, 256]."""
    normed, summed = ops.add_rms_norm(ops.rms_norm(x, weight, 1e-5), x, weight, 1e-5)
    heads = normed.view(-1, 4, 1, 64)
    q, k = ops.apply_rope(heads, heads[:, :2], table, table, lengths[:, None].long() - 1)
    ops.kv_write(k[:, :, 0], k[:, :, 0], *caches, slots)
    seen = ops.paged_decode_attention(q[:, :, 0], *caches, blocks, lengths)
    dense = ops.decode_attention(q[:, :, 0], *(c[:4].transpose(1, 2) for c in caches), lengths.clamp(max=16))
    mixed = ops.swiglu((seen + dense).flatten(1).repeat(1, 2))
    return summed + ops.packed_linear(mixed, projection)


def step_arguments(seed: int) -> tuple[Any, ...]:
    """Rows that are longer by one at every step."""
    at = torch.arange(4, device="cuda", dtype=torch.int32)
    blocks = torch.arange(16, device="cuda", dtype=torch.int32).view(4, 4)
    caches = tuple(randn(16, 16, 2, 64, dtype=torch.bfloat16, seed=s, device="cuda") for s in (1, 2))
    packed = ops.pack_weight(randn(256, 256, device="cuda") / 16, "int4")
    x, weight = (randn(*shape, dtype=torch.bfloat16, seed=seed, device="cuda") for shape in ((4, 256), (256,)))
    lengths = at * 7 + 2 + seed
    slots = at.long() * 64 + lengths - 1
    return x, weight, packed, randn(64, 32, seed=3, device="cuda"), caches, blocks, lengths, slots


@torch.inference_mode()
def test_a_compiled_step_has_no_break_and_is_compiled_once(backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(decode_step, fullgraph=True, backend=counter)
    for seed in range(4):
        ours, expected = compiled(*step_arguments(seed)), decode_step(*step_arguments(seed))
        torch.testing.assert_close(ours, expected, rtol=3e-2, atol=1e-1)
    assert counter.frame_count == 1


def test_a_compiled_layer_trains(backend: str) -> None:
    """Rows of other lengths, gradients, and one graph for all of them."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def layer(x: Tensor, weight: Tensor, wide: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed, summed = ops.add_rms_norm(ops.rms_norm(x, weight, 1e-5), x, weight, 1e-5)
        q = normed.unflatten(-1, (4, 16)).transpose(1, 2)
        q, k = ops.apply_rope(q, q[:, :1], cos, sin)
        return summed + ops.swiglu(ops.linear_gelu((q + k).transpose(1, 2).flatten(2), wide, None, "tanh"))

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (3, 5, 9):
        x, weight = (randn(*s, device="cuda").requires_grad_() for s in ((2, tokens, 64), (64,)))
        wide = (randn(128, 64, device="cuda") / 8).requires_grad_()
        cos, sin = (randn(2, tokens, 8, seed=s, device="cuda") for s in (3, 4))
        leaves = (x, weight, wide)
        ours, expected = compiled(*leaves, cos, sin), layer(*leaves, cos, sin)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        for got, want in zip(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert counter.frame_count == 1
