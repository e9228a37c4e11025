"""Ragged cross-attention against fp64 one token at a time: ranges of every kind, one token and many, gradients."""

from __future__ import annotations

import importlib

import pytest
import torch
import triton.language as tl
from torch import Tensor

from backends.cases import some_ranges
from backends.references import FLOATS, close, cross_attention, name_of, poisoned, randn
from llama_multimodal import ops
from llama_multimodal.ops import KeyRanges

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
SHAPES = [
    (1, 1, 1, 1, 1, 4), (2, 6, 2, 19, 40, 80), (2, 4, 1, 33, 130, 64), (3, 3, 3, 5, 70, 128), (2, 40, 1, 3, 30, 16),
    (1, 2, 1, 70, 20, 33), (1, 2, 2, 9, 20, 256),
]  # fmt: skip
"""rows, query heads, key heads, text tokens, vision tokens, head dim"""


def some_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    b, h, kv, t, s, d = shape
    q = randn(b, t, h, d, dtype=dtype, device=device).transpose(1, 2)
    k = randn(s, kv, d, dtype=dtype, seed=1, device=device).transpose(0, 1)
    return q, k, randn(kv, s, d, dtype=dtype, seed=2, device=device)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_attention(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    q, k, v = some_inputs(shape, dtype, device)
    ranges = some_ranges(shape[0], shape[3], shape[4], device)
    expected = cross_attention(q, k, v, ranges.table)
    ours = ops.cross_attention(q, poisoned(k), v, ranges)
    close(ours, expected, dtype)
    blind = ranges.table[..., 0] == ranges.table[..., 1]
    assert not ours.transpose(1, 2)[blind].any()
    for t in range(min(3, shape[3])):  # each token alone, as in decoding
        alone = KeyRanges((), ranges.table[:, t : t + 1])
        close(ops.cross_attention(q[:, :, t : t + 1], k, poisoned(v), alone), expected[:, :, t : t + 1], dtype)


def test_spans_and_table_agree(device: str) -> None:
    """The reference reads the spans, the kernels the table."""
    q, k, v = some_inputs((2, 4, 2, 6, 9, 16), torch.float32, device)
    ranges = KeyRanges.of([ops.Span(0, 1, 4, 0, 5), ops.Span(0, 4, 6, 5, 9), ops.Span(1, 0, 2, 2, 3)], 2, 6, device)
    ours = ops.cross_attention(q, k, v, ranges)
    with ops.use_backend("torch"):
        torch.testing.assert_close(ours, ops.cross_attention(q, k, v, ranges))


def test_no_vision_tokens_at_all(device: str) -> None:
    q, nothing = randn(2, 2, 3, 16, device=device), torch.zeros(1, 0, 16, device=device)
    for tokens in (3, 1):
        ranges = KeyRanges((), torch.zeros(2, tokens, 2, dtype=torch.int32, device=device))
        assert not ops.cross_attention(q[:, :, :tokens], nothing, nothing, ranges).any()


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_each_dtype(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    inputs = some_inputs(shape, dtype, device)
    grad = randn(shape[0], shape[1], shape[3], shape[5], dtype=dtype, seed=3, device=device)
    ranges = some_ranges(shape[0], shape[3], shape[4], device)
    leaves = [x.clone().requires_grad_() for x in inputs]
    ours = torch.autograd.grad(ops.cross_attention(*leaves, ranges), leaves, grad)
    leaves = [x.double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(cross_attention(*leaves, ranges.table), leaves, grad.double())
    for got, want in zip(ours, expected):
        close(got, want, dtype, scale=max(1, float(want.abs().max())))


def test_a_key_block_that_many_tiles_read(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than the backward kernel looks through at a time, the reading ones at either end."""
    tokens = 1100
    if device == "cpu":  # the interpreter reads the constant anew, and takes long over many tiles
        tokens = 30
        module = importlib.import_module("llama_multimodal.ops.backends.triton.cross_attention")
        monkeypatch.setattr(module, "_SCAN", tl.constexpr(8))
    q = randn(1, 16, tokens, 4, device=device)
    k, v = (randn(1, 40, 4, seed=seed, device=device) for seed in (1, 2))
    table = torch.zeros(1, tokens, 2, dtype=torch.int32, device=device)
    table[:, 1] = table[:, -2] = torch.tensor((3, 30))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    ours = torch.autograd.grad(ops.cross_attention(*leaves, KeyRanges((), table)).sum(), leaves)
    few = torch.tensor([1, tokens - 2], device=device)
    wide = [x.detach().double().requires_grad_() for x in (q[:, :, few], k, v)]
    expected = torch.autograd.grad(cross_attention(*wide, table[:, few]).sum(), wide)
    close(ours[0][:, :, few], expected[0], torch.float32)
    assert ours[0].abs().sum((0, 1, 3)).count_nonzero() == 2
    for got, want in zip(ours[1:], expected[1:]):
        close(got, want, torch.float32)


@pytest.mark.slow
def test_gradients(device: str) -> None:
    q, k, v = (x.requires_grad_() for x in some_inputs((2, 2, 1, 3, 5, 2), torch.float64, device))
    table = torch.tensor([[[0, 3], [0, 0], [2, 5]], [[4, 5], [0, 5], [1, 2]]], dtype=torch.int32, device=device)
    ranges = KeyRanges((), table)
    assert torch.autograd.gradcheck(lambda *inputs: ops.cross_attention(*inputs, ranges), (q, k, v))
