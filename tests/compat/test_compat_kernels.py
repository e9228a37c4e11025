"""The original's kernels against plain computations in fp64, and that they go through `ops`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.compat import KVCache, attention_cuda, fused_cuda, rmsnorm_cuda, rope_cuda
from llama_multimodal.errors import ConfigError

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def near(ours: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours.double(), expected, atol=tolerance, rtol=tolerance)


def turned(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """x: [B, T, H, D], angles: [B, T, D/2]; each pair as a complex number."""
    half = x.shape[3] // 2
    pairs = x.unflatten(3, (half, 2)) if interleaved else x.unflatten(3, (2, half)).transpose(3, 4)
    spun = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    out = torch.view_as_real(spun)
    return out.flatten(3) if interleaved else out.transpose(3, 4).flatten(3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_rope(dtype: torch.dtype, interleaved: bool, heads: int) -> None:
    x = normal(2, 5, heads, 8, dtype=dtype)
    freqs = torch.rand(4, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 3, 9, 0, 2]])
    angles = (positions[..., None].float() * freqs).double()
    expected = turned(x.double(), angles, interleaved)
    table = torch.arange(10)[:, None].float() * freqs
    for given in (freqs, table, torch.polar(torch.ones_like(table), table)):
        ours = rope_cuda.apply_rope(x, given, positions, interleaved=interleaved)
        assert ours.shape == x.shape and ours.dtype == dtype
        # The angles' own sines are rounded to fp32, also where x is wider.
        torch.testing.assert_close(ours.double(), expected, atol=max(TOLERANCE[dtype], 1e-6), rtol=1e-2)
    from_zero = rope_cuda.apply_rope(x, freqs, interleaved=interleaved)
    assert torch.equal(from_zero[0], rope_cuda.apply_rope(x, freqs, positions, interleaved=interleaved)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rmsnorm(dtype: torch.dtype) -> None:
    x, weight = normal(3, 4, 10, dtype=dtype), normal(10, dtype=dtype, seed=1)
    wide = x.double()
    near(rmsnorm_cuda.forward(x, weight, 0.1), wide / (wide.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    gate, up = normal(3, 7, dtype=dtype), normal(3, 7, dtype=dtype, seed=1)
    near(fused_cuda.swiglu(gate, up), gate.double() / (1 + (-gate.double()).exp()) * up.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_linear_gelu(dtype: torch.dtype, approximate: Any) -> None:
    x, weight, bias = normal(3, 5, 6, dtype=dtype), normal(4, 6, dtype=dtype, seed=1), normal(4, dtype=dtype, seed=2)
    for offset in (bias, None):
        product = x.double() @ weight.double().T + (0 if offset is None else offset.double())
        inner = product * (1 + torch.erf(product / math.sqrt(2))) / 2
        if approximate == "tanh":
            inner = product * (1 + torch.tanh(math.sqrt(2 / math.pi) * (product + 0.044715 * product**3))) / 2
        near(fused_cuda.linear_gelu(x, weight, offset, approximate), inner)


def attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B, T, H, D], with the keys repeated."""
    k, v = (x.double().repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k) / math.sqrt(q.shape[3])
    return torch.einsum("bhts,bshd->bthd", (scores + (0 if bias is None else bias)).softmax(-1), v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "bool", "additive", "by row"])
def test_gqa(dtype: torch.dtype, kind: str) -> None:
    q, k, v = normal(2, 5, 6, 8, dtype=dtype), normal(2, 5, 2, 8, dtype=dtype, seed=1), normal(2, 5, 2, 8, dtype=dtype)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    bias = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~causal, float("-inf"))
    mask = {"none": None, "bool": causal, "additive": bias.to(dtype), "by row": causal.expand(2, 1, 5, 5)}[kind]
    expected = attended(q, k, v, None if mask is None else bias)
    ours = attention_cuda.gqa_forward(q, k, v, mask, None, 6, 2, 8)
    near(ours, expected)
    flat = attention_cuda.gqa_forward(q.flatten(2), k.flatten(2), v.flatten(2), mask, None, 6, 2, 8)
    assert torch.equal(flat, ours.flatten(2))


def test_gqa_with_a_cache_is_gqa_of_the_whole() -> None:
    q, k, v = normal(2, 6, 4, 8), normal(2, 6, 2, 8, seed=1), normal(2, 6, 2, 8, seed=2)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    whole = attended(q, k, v, torch.zeros(6, 6, dtype=torch.float64).masked_fill(~causal, float("-inf")))
    cache = KVCache.allocate(2, 6, 2, 8, torch.float64)
    first = 0
    for end in (3, 4, 6):
        new = slice(first, end)
        ours = attention_cuda.gqa_forward(q[:, new], k[:, new], v[:, new], causal[new, :end], cache, 4, 2, 8)
        near(ours, whole[:, new])
        assert cache.length == end
        first = end
    with pytest.raises(ConfigError, match="the cache holds 6 tokens, and 7 are asked for"):
        attention_cuda.gqa_forward(q[:, :1], k[:, :1], v[:, :1], None, cache, 4, 2, 8)
    one = KVCache.allocate(2, 6, 2, 8, torch.float64)
    for t in range(3):  # one at a time, without a mask
        new = slice(t, t + 1)
        near(attention_cuda.gqa_forward(q[:, new], k[:, new], v[:, new], None, one, 4, 2, 8), whole[:, new])


X = normal(2, 5, 4, 8)
CALLS: list[tuple[Callable[[], Any], str]] = [
    (lambda: rope_cuda.apply_rope(X[0], torch.ones(4)), r"x must be \[batch, seq, heads, even dim\]"),
    (lambda: rope_cuda.apply_rope(X, torch.ones(8)), r"freqs must be \[4\] or \[positions, 4\]"),
    (lambda: rope_cuda.apply_rope(X, torch.ones(4), torch.arange(4)), r"position_ids must be \[2, 5\]"),
    (lambda: rmsnorm_cuda.forward(X, torch.ones(4), 1e-5), r"weight must be \[D\]"),
    (lambda: fused_cuda.swiglu(X, X[:1]), "they must be equal"),
    (lambda: fused_cuda.linear_gelu(X, torch.ones(3, 4)), r"weight must be \[outputs, inputs\]"),
    (lambda: fused_cuda.linear_gelu(X, torch.ones(3, 8), torch.ones(8)), "do not go together"),
    (lambda: fused_cuda.linear_gelu(X, torch.ones(3, 8), None, "sigmoid"), 'neither "none" nor "tanh"'),  # type: ignore[arg-type]
    (lambda: attention_cuda.gqa_forward(X, X, X, None, None, 4, 3, 8), "must be a multiple of n_kv_heads 3"),
    (lambda: attention_cuda.gqa_forward(X, X, X, None, None, 4, 2, 8), r"k must be \[batch, seq, 2, 8\]"),
    (lambda: attention_cuda.gqa_forward(X, X[:1], X, None, None, 4, 4, 8), "do not go together"),
    (lambda: attention_cuda.gqa_forward(X, X, X, torch.ones(4, 5), None, 4, 4, 8), r"mask must be \[5, 5\]"),
    (lambda: attention_cuda.gqa_forward(X, X, X, None, (X, X), 4, 4, 8), "see KVCache.allocate"),  # type: ignore[arg-type]
    (lambda: attention_cuda.gqa_forward(X, X, X, None, KVCache.allocate(1, 9, 4, 8), 4, 4, 8), "the cache is for"),
]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_refused(number: int) -> None:
    call, message = CALLS[number]
    with pytest.raises(ConfigError, match=message):
        call()


def test_gradients() -> None:
    x, weight = normal(1, 3, 2, 4).requires_grad_(), normal(4, seed=1).requires_grad_()
    freqs = torch.tensor([0.3, 0.1])
    assert torch.autograd.gradcheck(lambda x: rope_cuda.apply_rope(x, freqs), x)
    assert torch.autograd.gradcheck(lambda x, w: rmsnorm_cuda.forward(x, w, 0.1), (x, weight))
    assert torch.autograd.gradcheck(lambda x: attention_cuda.gqa_forward(x, x, x, None, None, 2, 2, 4), x)


def test_they_go_through_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that kernels step in, and fall back, by themselves."""
    called: list[str] = []
    original = ops._dispatch.call

    def call(op: str, *args: Any, **kwargs: Any) -> Any:
        called.append(op)
        return original(op, *args, **kwargs)

    monkeypatch.setattr(ops._dispatch, "call", call)
    rope_cuda.apply_rope(X, torch.ones(4))
    rmsnorm_cuda.forward(X, torch.ones(8).double(), 1e-5)
    attention_cuda.gqa_forward(X, X, X, None, None, 4, 4, 8)
    fused_cuda.swiglu(X, X)
    fused_cuda.linear_gelu(X, normal(3, 8))
    assert called == ["apply_rope", "rms_norm", "attention", "swiglu", "linear_gelu", "linear"]
    assert torch.equal(F.silu(X) * X, fused_cuda.swiglu(X, X))
