"""Each op against a plain fp64 computation written here, its gradients, and the dispatch."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.config import RopeScaling
from llama_multimodal.errors import DeviceError
from llama_multimodal.ops import KeyRanges, Span, _dispatch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=[str(dtype).removeprefix("torch.") for dtype in DTYPES])


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Values that `dtype` holds exactly."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def close(ours: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    """Every element, within the dtype's tolerance; the reference is fp64 from the same rounded inputs."""
    assert ours.dtype == dtype and reference.dtype == torch.float64
    torch.testing.assert_close(ours.double(), reference, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def gradients(function, *inputs: Tensor) -> None:
    leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-7, rtol=1e-5)


# --- rms_norm --------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 1, 33), (2, 3, 4, 129)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = 3 * randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1)
    wide = x.double()
    expected = wide / (wide.pow(2).sum(-1, keepdim=True) / shape[-1] + 1e-5).sqrt() * weight.double()
    close(ops.rms_norm(x, weight, 1e-5), expected, dtype)


def test_rms_norm_of_large_half_values_does_not_overflow() -> None:
    x = torch.full((1, 8), 1000.0, dtype=torch.float16)  # the square is past fp16
    assert torch.equal(ops.rms_norm(x, torch.ones(8, dtype=torch.float16), 1e-5), torch.ones_like(x))


@each_dtype
def test_add_rms_norm(dtype: torch.dtype) -> None:
    x, residual, weight = randn(3, 5, 33, dtype=dtype), randn(3, 5, 33, dtype=dtype, seed=1), randn(33, dtype=dtype)
    normed, summed = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(summed, residual + x) and torch.equal(normed, ops.rms_norm(summed, weight, 1e-5))


def test_rms_norm_rounds_before_the_weight() -> None:
    x, weight = randn(4, 64, dtype=torch.bfloat16), randn(64, dtype=torch.bfloat16, seed=1)
    wide = x.float()
    rounded = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(torch.bfloat16)
    assert torch.equal(ops.rms_norm(x, weight, 1e-5), rounded * weight)


def test_rms_norm_eps_counts() -> None:
    x = torch.full((4,), 1e-3, dtype=torch.float64)
    torch.testing.assert_close(ops.rms_norm(x, torch.ones(4).double(), 3e-6), torch.full_like(x, 0.5))


def test_rms_norm_gradients() -> None:
    gradients(lambda x, w: ops.rms_norm(x, w, 1e-5), randn(2, 3, 5), randn(5, seed=1))


# --- rope ------------------------------------------------------------------------------------------------------------


def plain_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> list[float]:
    """Llama 3.1's rule, one frequency at a time."""
    out = []
    for i in range(head_dim // 2):
        frequency = theta ** (-2 * i / head_dim)
        if scaling is not None:
            turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)  # in the original context
            if turns < scaling.low_freq_factor:
                frequency /= scaling.factor
            elif turns <= scaling.high_freq_factor:
                span = scaling.high_freq_factor - scaling.low_freq_factor
                share = (turns - scaling.low_freq_factor) / span
                frequency *= (1 - share) / scaling.factor + share
        out.append(frequency)
    return out


@pytest.mark.parametrize("scaling", [None, RopeScaling(), RopeScaling(factor=32.0, low_freq_factor=2.0)])
@pytest.mark.parametrize("head_dim", [2, 10, 128])
def test_rope_frequencies(head_dim: int, scaling: RopeScaling | None) -> None:
    ours = ops.rope_frequencies(head_dim, 500000.0, scaling)
    expected = torch.tensor(plain_frequencies(head_dim, 500000.0, scaling), dtype=torch.float64)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=0)


def test_rope_scaling_has_all_three_ranges() -> None:
    """At the released sizes the rule keeps, blends and divides some frequencies each."""
    plain, scaled = (ops.rope_frequencies(128, 500000.0, s) for s in (None, RopeScaling()))
    ratio = plain / scaled
    assert (ratio == 1).any() and (ratio == 8).any() and ((ratio > 1.01) & (ratio < 7.99)).any()


@each_dtype
@pytest.mark.parametrize("heads, kv_heads, tokens, dim", [(1, 1, 1, 2), (3, 1, 5, 6), (4, 2, 7, 34)])
def test_apply_rope(dtype: torch.dtype, heads: int, kv_heads: int, tokens: int, dim: int) -> None:
    q, k = randn(2, heads, tokens, dim, dtype=dtype), randn(2, kv_heads, tokens, dim, dtype=dtype, seed=1)
    positions = torch.randint(0, 100, (2, tokens), generator=torch.Generator().manual_seed(2))
    frequencies = ops.rope_frequencies(dim, 10000.0, RopeScaling(original_max_position_embeddings=64))
    ours = ops.apply_rope(q, k, *ops.rope_angles(positions, frequencies))
    turn = torch.polar(torch.ones(()).double(), (positions[..., None].float() * frequencies).double())[:, None]
    tolerance = max(TOLERANCE[dtype], 1e-6)  # the angles' cosines are fp32
    for got, x in zip(ours, (q, k)):
        pairs = torch.complex(*x.double().chunk(2, dim=-1)) * turn
        expected = torch.cat((pairs.real, pairs.imag), dim=-1)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_rope_depends_on_distance_only() -> None:
    q, k = randn(1, 1, 1, 16), randn(1, 1, 1, 16, seed=1)
    frequencies = ops.rope_frequencies(16, 10000.0, None)

    def score(at_q: int, at_k: int) -> float:
        turned, _ = ops.apply_rope(q, q, *ops.rope_angles(torch.tensor([[at_q]]), frequencies))
        _, other = ops.apply_rope(k, k, *ops.rope_angles(torch.tensor([[at_k]]), frequencies))
        return float((turned * other).sum())

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(4, 9), abs=1e-2)


def test_rope_gradients() -> None:
    cos, sin = ops.rope_angles(torch.tensor([[3, 8]]), ops.rope_frequencies(6, 100.0, None))
    gradients(lambda q, k: ops.apply_rope(q, k, cos.double(), sin.double()), randn(1, 2, 2, 6), randn(1, 1, 2, 6))


# --- swiglu ----------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 33)])
def test_swiglu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up = 3 * randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    close(ops.swiglu(gate, up), gate.double() / (1 + (-gate.double()).exp()) * up.double(), dtype)


def test_swiglu_gradients() -> None:
    gradients(ops.swiglu, randn(2, 5), randn(2, 5, seed=1))


# --- attention -------------------------------------------------------------------------------------------------------


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """One head at a time, in fp64; bias: [B, T, S]."""
    q, k, v = q.double(), k.double(), v.double()
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out = []
    for h in range(heads):
        scores = torch.einsum("btd,bsd->bts", q[:, h], k[:, h // group]) / math.sqrt(q.shape[-1])
        if bias is not None:
            scores = scores + bias
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        out.append(torch.einsum("bts,bsd->btd", weights / weights.sum(-1, keepdim=True), v[:, h // group]))
    return torch.stack(out, dim=1)


def heads_of(b: int, h: int, t: int, d: int, dtype: torch.dtype, seed: int) -> Tensor:
    """[B, H, T, D] with the strides of a model's: a transposed [B, T, H, D]."""
    return randn(b, t, h, d, dtype=dtype, seed=seed).transpose(1, 2)


def hidden(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)


SHAPES = [(1, 1, 1, 1, 1, 4), (2, 3, 3, 5, 7, 6), (2, 6, 2, 1, 9, 8), (3, 4, 1, 5, 5, 16), (1, 8, 2, 17, 33, 10)]
"""batch, query heads, key heads, queries, keys, head dim"""


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    b, h, kv, t, s, d = shape
    q, k, v = heads_of(b, h, t, d, dtype, 0), heads_of(b, kv, s, d, dtype, 1), heads_of(b, kv, s, d, dtype, 2)
    close(ops.attention(q, k, v), plain_attention(q, k, v), dtype)


@each_dtype
@pytest.mark.parametrize("h, kv, t", [(1, 1, 1), (4, 2, 1), (4, 2, 9), (3, 1, 17)])
def test_attention_causal(dtype: torch.dtype, h: int, kv: int, t: int) -> None:
    q, k, v = heads_of(2, h, t, 6, dtype, 0), heads_of(2, kv, t, 6, dtype, 1), heads_of(2, kv, t, 6, dtype, 2)
    bias = hidden(torch.ones(t, t, dtype=torch.bool).tril())
    close(ops.attention(q, k, v, causal=True), plain_attention(q, k, v, bias), dtype)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("rows", ["one", "each"])
def test_attention_mask(dtype: torch.dtype, shape: tuple[int, ...], rows: str) -> None:
    """Boolean and additive, for the whole batch or for each row."""
    b, h, kv, t, s, d = shape
    q, k, v = heads_of(b, h, t, d, dtype, 0), heads_of(b, kv, s, d, dtype, 1), heads_of(b, kv, s, d, dtype, 2)
    mask = randn(b if rows == "each" else 1, 1, t, s, seed=3) > 0
    mask[..., 0] = True
    close(ops.attention(q, k, v, mask=mask), plain_attention(q, k, v, hidden(mask[:, 0])), dtype)
    added = randn(b if rows == "each" else 1, 1, t, s, dtype=dtype, seed=4)
    close(ops.attention(q, k, v, mask=added), plain_attention(q, k, v, added[:, 0].double()), dtype)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("with_mask", ["none", "bool", "additive"])
def test_attention_key_bias(dtype: torch.dtype, shape: tuple[int, ...], with_mask: str) -> None:
    b, h, kv, t, s, d = shape
    q, k, v = heads_of(b, h, t, d, dtype, 0), heads_of(b, kv, s, d, dtype, 1), heads_of(b, kv, s, d, dtype, 2)
    key_bias = torch.randint(1, 5000, (s,), generator=torch.Generator().manual_seed(5)).log()
    key_bias[s // 2] = -math.inf
    bias, mask = key_bias.double().expand(1, t, s), None
    if with_mask == "bool":
        mask = randn(b, 1, t, s, seed=3) > 0
        mask[..., 0] = True
        bias = bias + hidden(mask[:, 0])
    elif with_mask == "additive":
        mask = randn(b, 1, t, s, dtype=dtype, seed=4)
        bias = bias + mask[:, 0].double()
    close(ops.attention(q, k, v, mask=mask, key_bias=key_bias), plain_attention(q, k, v, bias), dtype)


def test_a_key_with_log_n_counts_n_times() -> None:
    q, k, v = heads_of(1, 2, 3, 4, torch.float64, 0), randn(1, 2, 5, 4, seed=1), randn(1, 2, 5, 4, seed=2)
    counts = torch.tensor([1, 3, 1, 7, 2])
    repeated = ops.attention(q, k.repeat_interleave(counts, dim=2), v.repeat_interleave(counts, dim=2))
    torch.testing.assert_close(ops.attention(q, k, v, key_bias=counts.double().log()), repeated, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "t, kwargs", [(3, {"causal": True}), (3, {}), (1, {}), (3, {"key_bias": torch.ones(3).cumsum(0)})]
)
def test_attention_gradients(t: int, kwargs: dict) -> None:
    q, k, v = randn(1, 4, t, 4), randn(1, 2, 3, 4, seed=1), randn(1, 2, 3, 4, seed=2)
    gradients(lambda q, k, v: ops.attention(q, k, v, **kwargs), q, k, v)


# --- cross_attention -------------------------------------------------------------------------------------------------

SPANS = [Span(0, 1, 3, 0, 5), Span(0, 3, 4, 2, 9), Span(2, 0, 1, 9, 10), Span(2, 4, 6, 5, 13)]
"""Row 0 sees nothing at tokens 0, 4 and 5; row 1 nothing at all; row 2 nothing between its spans."""


@each_dtype
@pytest.mark.parametrize("h, kv", [(1, 1), (4, 2), (6, 2)])
def test_cross_attention(dtype: torch.dtype, h: int, kv: int) -> None:
    q, k, v = (
        heads_of(3, h, 6, 8, dtype, 0),
        randn(kv, 13, 8, dtype=dtype, seed=1),
        randn(kv, 13, 8, dtype=dtype, seed=2),
    )
    expected = torch.zeros(q.shape, dtype=torch.float64)
    for span in SPANS:
        keys, tokens = slice(span.key_first, span.key_end), slice(span.first, span.end)
        part = plain_attention(q[span.row, :, tokens][None], k[None, :, keys], v[None, :, keys])
        expected[span.row, :, tokens] = part[0]
    ranges = KeyRanges.of(SPANS, 3, 6)
    assert ranges.table[2, :, 1].tolist() == [10, 0, 0, 0, 13, 13] and ranges.table.dtype == torch.int32
    ours = ops.cross_attention(q, k, v, ranges)
    close(ours, expected, dtype)
    seen = torch.zeros(3, 6, dtype=torch.bool)
    for span in SPANS:
        seen[span.row, span.first : span.end] = True
    assert (ours.transpose(1, 2)[~seen] == 0).all()  # exactly, whatever the keys hold
    assert (ours.transpose(1, 2)[seen] != 0).any(-1).any(-1).all()


def test_cross_attention_without_spans_is_zero() -> None:
    q, k = randn(2, 2, 3, 4), randn(1, 5, 4)
    assert torch.equal(ops.cross_attention(q, k, k, KeyRanges.of([], 2, 3)), torch.zeros_like(q))


def test_cross_attention_gradients() -> None:
    ranges = KeyRanges.of([Span(0, 1, 3, 0, 4), Span(1, 2, 3, 2, 5)], 2, 3)
    gradients(
        lambda q, k, v: ops.cross_attention(q, k, v, ranges), randn(2, 2, 3, 4), randn(1, 5, 4), randn(1, 5, 4, seed=1)
    )


# --- linear ----------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("shape, out", [((1,), 1), ((7,), 5), ((3, 33), 2), ((2, 9, 17), 31), ((4, 4, 2, 8), 3)])
@pytest.mark.parametrize("native", [True, False], ids=["native", "widened"])
def test_linear(
    dtype: torch.dtype, shape: tuple[int, ...], out: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("llama_multimodal.ops.linear"), "cpu_multiplies", lambda dtype: native)
    x, weight, bias = randn(*shape, dtype=dtype), randn(out, shape[-1], dtype=dtype, seed=1), randn(out, dtype=dtype)
    expected = torch.einsum("...k,nk->...n", x.double(), weight.double())
    scale = math.sqrt(shape[-1])  # what is rounded is a sum of K products
    for got, want in ((ops.linear(x, weight), expected), (ops.linear(x, weight, bias), expected + bias.double())):
        close(got / scale, want / scale, dtype)


def test_linear_widens_long_half_inputs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without bf16 arithmetic a product of many rows is taken in fp32 and rounded once."""
    module = importlib.import_module("llama_multimodal.ops.linear")
    monkeypatch.setattr(module, "cpu_multiplies", lambda dtype: False)
    x, weight = randn(40, 96, dtype=torch.bfloat16), randn(24, 96, dtype=torch.bfloat16, seed=1)
    assert torch.equal(ops.linear(x, weight), (x.float() @ weight.float().T).to(torch.bfloat16))
    assert [module.widens(x[:n]) for n in (1, 15, 16)] == [False, False, True]
    assert not module.widens(x.float())
    monkeypatch.setattr(module, "cpu_gains_by", lambda dtype: True)
    assert not module.widens(x)


@pytest.mark.parametrize(
    ("vendor", "flags", "gains"),
    [
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("GenuineIntel", "avx512f avx512_bf16", False),
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16", True),
    ],
)
def test_where_pairs_of_bf16_are_slow(
    vendor: str, flags: str, gains: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Intel's processors without their matrix unit multiply in fp32."""
    module = importlib.import_module("llama_multimodal.ops.linear")
    monkeypatch.setattr(module, "cpu_multiplies", lambda dtype: True)
    lines = {"vendor_id": ["vendor_id", ":", vendor], "flags": ["flags", ":", *flags.split()]}
    monkeypatch.setattr(module, "_cpu_line", lambda *names: lines[names[0]])
    for kept in (module._has_slow_pairs, module.has_matrix_unit):
        kept.cache_clear()
        request.addfinalizer(kept.cache_clear)
    x = torch.zeros(16, 4, dtype=torch.bfloat16)
    assert module.widens(x) is not gains and not module.widens(x[:15])


@torch.no_grad()
def test_linear_widens_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and outputs in pieces, the last ones shorter: no fp32 copy of the whole weight is made."""
    module = importlib.import_module("llama_multimodal.ops.linear")
    monkeypatch.setattr(module, "cpu_multiplies", lambda dtype: False)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 32)
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", 40 * 96)  # 32 outputs
    x, weight = randn(3, 25, 96, dtype=torch.bfloat16), randn(77, 96, dtype=torch.bfloat16, seed=1)
    bias = randn(77, dtype=torch.bfloat16)
    expected = (x.float() @ weight.float().T + bias.float()).to(torch.bfloat16)
    close(ops.linear(x, weight, bias), expected.double(), torch.bfloat16)
    assert ops.linear(x[:0], weight).shape == (0, 25, 77)


def test_linear_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients(ops.linear, randn(2, 3, 5), randn(4, 5, seed=1), randn(4, seed=2))
    # Through the widened path the gradients come back in the dtype of what was given.
    module = importlib.import_module("llama_multimodal.ops.linear")
    monkeypatch.setattr(module, "cpu_multiplies", lambda dtype: False)
    x = randn(20, 8, dtype=torch.bfloat16).requires_grad_()
    weight = randn(6, 8, dtype=torch.bfloat16, seed=1).requires_grad_()
    ops.linear(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is not None
    close(x.grad, weight.detach().double().sum(0).expand(20, 8), torch.bfloat16)
    close(weight.grad / 5, x.detach().double().sum(0).expand(6, 8) / 5, torch.bfloat16)
    # Neither it nor a CPU whose bf16 is no faster keeps wide copies for the backward pass, and a bias learns too.
    kept: list[torch.dtype] = []

    def keep(saved: torch.Tensor) -> torch.Tensor:
        kept.append(saved.dtype)
        return saved

    for native in (False, True):
        monkeypatch.setattr(module, "cpu_multiplies", lambda dtype, native=native: native)
        monkeypatch.setattr(module, "_has_slow_pairs", lambda native=native: native)
        bias = randn(6, dtype=torch.bfloat16, seed=2).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            ops.linear(x, weight, bias).sum().backward()
        assert set(kept) == {torch.bfloat16} and bias.grad is not None and bias.grad.tolist() == [20.0] * 6


# --- decode attention, dense and paged -------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("h, kv", [(1, 1), (4, 2), (6, 2)])
def test_decode_attention(dtype: torch.dtype, h: int, kv: int) -> None:
    q, k, v = randn(4, h, 8, dtype=dtype), heads_of(4, kv, 9, 8, dtype, 1), heads_of(4, kv, 9, 8, dtype, 2)
    lengths = torch.tensor([9, 1, 0, 4], dtype=torch.int32)
    bias = randn(9, dtype=torch.float32)
    for key_bias in (None, bias):
        ours = ops.decode_attention(q, k, v, lengths, key_bias)
        assert (ours[2] == 0).all()
        for row in (0, 1, 3):
            n = int(lengths[row])
            added = None if key_bias is None else key_bias[:n].double().expand(1, 1, n)
            part = plain_attention(q[row][None, :, None], k[row, :, :n][None], v[row, :, :n][None], added)
            close(ours[row], part[0, :, 0], dtype)


@each_dtype
def test_paged_decode_attention_and_kv_write_equal_the_dense_ones(dtype: torch.dtype) -> None:
    slots, lengths = 4, torch.tensor([9, 4, 0, 1], dtype=torch.int32)
    table = torch.tensor([[7, 2, 5], [0, -1, 99], [-1, 99, 99], [3, 99, -1]], dtype=torch.int32)  # junk past the ends
    k_cache, v_cache = (torch.full((8, slots, 2, 8), 7.0, dtype=dtype) for _ in range(2))
    q, k, v = randn(4, 6, 8, dtype=dtype), heads_of(4, 2, 12, 8, dtype, 1), heads_of(4, 2, 12, 8, dtype, 2)
    where = torch.tensor(
        [
            int(table[row, p // slots]) * slots + p % slots if p < lengths[row] else -1
            for row in range(4)
            for p in range(12)
        ]
    )
    ops.kv_write(k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1), k_cache, v_cache, where)
    assert torch.equal(k_cache[2, 1], k[0, :, 5]) and torch.equal(v_cache[0, 3], v[1, :, 3])
    written = torch.zeros(8 * slots, dtype=torch.bool)
    written[where[where >= 0]] = True
    assert (k_cache.view(-1, 2, 8)[~written] == 7).all()
    paged = ops.paged_decode_attention(q, k_cache, v_cache, table, lengths)
    torch.testing.assert_close(paged, ops.decode_attention(q, k, v, lengths), rtol=TOLERANCE[dtype], atol=1e-6)
    assert (paged[2] == 0).all()


# --- linear_gelu, packed weights, linear_cross_entropy ---------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_linear_gelu(dtype: torch.dtype, approximate: str) -> None:
    x, weight, bias = randn(5, 9, dtype=dtype), randn(4, 9, dtype=dtype, seed=1) / 3, randn(4, dtype=dtype)
    wide = x.double() @ weight.double().T + bias.double()
    if approximate == "none":
        expected = wide * (1 + torch.erf(wide / math.sqrt(2))) / 2
    else:
        expected = wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))) / 2
    close(ops.linear_gelu(x, weight, bias, approximate), expected, dtype)


@pytest.mark.parametrize("group", [2, 32])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_packed_weights_are_within_half_a_step(format: str, symmetric: bool, group: int) -> None:
    weight = randn(5, 64, dtype=torch.float32) + 0.5
    weight[1] = 0
    weight[2, :32] *= 1000
    packed = ops.pack_weight(weight, format, group=group, symmetric=symmetric)
    step = packed.scales.float().repeat_interleave(group, dim=1)
    # fp16 rounds the scale, which can push the largest values of a group a little past the range.
    assert (
        (ops.unpack_weight(packed) - weight).abs() <= step * (0.51 + (128 if format == "int8" else 16) / 2048)
    ).all()
    assert (ops.unpack_weight(packed)[1] == 0).all()
    assert packed.values.dtype == (torch.int8 if format == "int8" else torch.uint8)
    assert packed.values.shape == (5, 64 if format == "int8" else 32)
    x, bias = randn(2, 3, 64, dtype=torch.float32), randn(5, dtype=torch.float32)
    prepared = ops.prepare_weight(packed)
    expected = x.double() @ ops.unpack_weight(packed).double().T + bias.double()
    scale = 1000 * math.sqrt(64)
    close(ops.packed_linear(x, prepared, bias) / scale, expected / scale, torch.float32)


def test_int4_keeps_the_even_column_in_the_low_half() -> None:
    packed = ops.pack_weight(torch.tensor([[-8.0, 7.0, 0.0, 1.0]]), "int4", group=4)
    assert packed.scales.item() == pytest.approx(8 / 7, rel=1e-3) and packed.zeros is None
    stored = [round(value / (8 / 7)) + 8 for value in (-8, 7, 0, 1)]
    assert packed.values.tolist() == [[stored[0] | stored[1] << 4, stored[2] | stored[3] << 4]]


def test_packed_bf16_is_the_weight() -> None:
    weight = randn(3, 5, dtype=torch.float32)
    packed = ops.pack_weight(weight, "bf16")
    assert torch.equal(ops.unpack_weight(packed), weight.bfloat16().float()) and packed.nbytes == 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1e-25, 1e-3, 1.0, 1e30])
def test_rounded_activations_are_within_half_a_step(dtype: torch.dtype, size: float) -> None:
    """Every block of 32 by itself; cubes of normal values have outliers."""
    for seed in range(20):
        x = (size * randn(5, 3, 96, seed=100 * seed) ** 3).to(dtype)
        rounded = ops.round_activations(x)
        assert rounded.dtype == torch.float32 and rounded.shape == x.shape
        blocks = x.double().unflatten(-1, (3, 32))
        step = blocks.abs().amax(-1, keepdim=True) / 127
        whole, error = rounded.double().unflatten(-1, (3, 32)) / step, (rounded.double() - x.double()).abs()
        assert (whole - whole.round()).abs().max() < 1e-4 and whole.abs().amax(-1).round().eq(127).all()
        assert (error.unflatten(-1, (3, 32)) <= 0.5001 * step).all()
        again = ops.round_activations(rounded)  # its largest values, and so the steps, come back to fp32's rounding
        torch.testing.assert_close(again, rounded, rtol=3e-7, atol=0)


def test_rounded_activations_take_whole_blocks() -> None:
    with pytest.raises(ValueError, match=r"a multiple of 32 inputs, not \[1, 48\]"):
        ops.packed_linear(randn(1, 48), ops.pack_weight(randn(4, 48), "int8", group=16), None, True)


def test_rounded_activations_of_blocks_apart() -> None:
    x = torch.ones(7, 32)
    x[0], x[1], x[2, 3], x[3, 3], x[4, 3], x[5, 3] = 0, 9e-31, math.nan, math.inf, -math.inf, -1000
    whole = ops.round_activations(x.view(1, -1)).view(7, 32)
    assert (whole[:2] == 0).all() and whole[2:5].isnan().all() and (whole[6] == 1).all()
    assert whole[5, 3] == -1000 and (whole[5, 4:] == 0).all()  # a step of 1000 / 127


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_gradients_pass_rounded_activations_straight_through(format: str, dtype: torch.dtype) -> None:
    packed = ops.prepare_weight(ops.pack_weight(randn(5, 64, dtype=torch.float32), format))
    bias, direction = randn(5, dtype=dtype), randn(3, 5, dtype=torch.float32)
    results, gradients = [], []
    for int8_activations in (False, True):
        x = randn(3, 64, dtype=dtype).requires_grad_()
        out = ops.packed_linear(x, packed, bias, int8_activations)
        (out.float() * direction).sum().backward()
        assert out.dtype == dtype and x.grad is not None
        results.append(out)
        gradients.append(x.grad)
    assert not torch.equal(*results)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    rounded = ops.round_activations(x.detach()).double()
    expected = rounded @ ops.unpack_weight(packed).double().T + bias.double()
    torch.testing.assert_close(results[1].double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    "weight, format, message",
    [
        (torch.zeros(3), "int8", "takes a matrix"),
        (torch.zeros(2, 48), "int8", "48 columns cannot be packed as int8 in groups of 32"),
        (torch.full((1, 32), float("nan")), "int4", "not finite"),
        (torch.full((1, 32), 1e9), "int4", "too large for a scale"),
    ],
)
def test_what_cannot_be_packed_says_why(weight: Tensor, format: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.pack_weight(weight, format)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [1, 3, 100], ids=["a row a chunk", "three", "all"])
def test_linear_cross_entropy(reduction: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.import_module("llama_multimodal.ops.linear_cross_entropy"), "_CHUNK_LOGITS", rows * 11
    )
    x, weight = randn(7, 5).requires_grad_(), randn(11, 5, seed=1).requires_grad_()
    labels = torch.tensor([3, -100, 0, 10, -100, 3, 7])
    plain = torch.nn.functional.cross_entropy(x @ weight.T, labels, reduction=reduction)
    wanted = torch.autograd.grad(2 * plain, (x, weight))
    ours = ops.linear_cross_entropy(x, weight, labels, reduction=reduction)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(2 * ours, (x, weight)), wanted)
    gradients(lambda x, w: ops.linear_cross_entropy(x, w, labels, reduction=reduction), x, weight)


def test_linear_cross_entropy_of_no_token_is_zero() -> None:
    x, weight = randn(2, 5).requires_grad_(), randn(11, 5, seed=1)
    loss = ops.linear_cross_entropy(x, weight, torch.full((2,), -100))
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


# --- dispatch --------------------------------------------------------------------------------------------------------


def test_an_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(DeviceError, match=r'unknown backend "tritom"; did you mean "triton"'),
        ops.use_backend("tritom"),
    ):
        pass
    monkeypatch.setenv("LLAMA_MM_BACKEND", "gpu")
    with pytest.raises(DeviceError, match="unknown backend"):
        ops.swiglu(randn(2), randn(2))


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every backend is there and holds nothing."""
    monkeypatch.setattr(_dispatch, "_kernels", {})
    monkeypatch.setattr(_dispatch, "why_missing", lambda backend: None)
    monkeypatch.delenv("LLAMA_MM_BACKEND", raising=False)


def test_a_backend_that_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "why_missing", lambda backend: "no such luck")
    with pytest.raises(DeviceError, match='"triton" cannot be used here: no such luck'), ops.use_backend("triton"):
        pass
    monkeypatch.setenv("LLAMA_MM_BACKEND", "cuda")
    with pytest.raises(DeviceError, match='"cuda" cannot be used here: no such luck'):
        ops.swiglu(randn(2), randn(2))
    monkeypatch.delenv("LLAMA_MM_BACKEND")
    assert ops.available() == {} and ops.swiglu(randn(2), randn(2)).shape == (2,)


def seven(gate: Tensor, up: Tensor | None = None) -> Tensor:
    return torch.full_like(gate, 7)


@pytest.mark.usefixtures("no_kernels")
def test_a_forced_kernel_that_refuses_is_an_error_and_not_a_fallback() -> None:
    def refuses(gate: Tensor, up: Tensor | None = None) -> str | None:
        return "takes fp32 only" if gate.dtype != torch.float32 else None

    _dispatch.register("swiglu", "triton", refuses=refuses)(seven)
    wide, single = randn(3), randn(3, dtype=torch.float32)
    with ops.use_backend("triton"):
        assert (ops.swiglu(single, single) == 7).all()
        with pytest.raises(DeviceError, match='swiglu on backend "triton": takes fp32 only'):
            ops.swiglu(wide, wide)
        with pytest.raises(DeviceError, match="no backward, and a gradient is wanted"):
            ops.swiglu(single.requires_grad_(), single)
        with torch.no_grad():
            assert (ops.swiglu(single, single) == 7).all()
        assert ops.rms_norm(wide, wide, 1e-5).shape == (3,)  # left to torch by design


@pytest.mark.usefixtures("no_kernels")
def test_left_to_itself_the_dispatch_falls_back() -> None:
    calls = []

    @_dispatch.register("swiglu", "cpu", refuses=lambda gate, up: "odd" if gate.numel() % 2 else None)
    def kernel(gate: Tensor, up: Tensor | None) -> Tensor:
        calls.append(gate.numel())
        return seven(gate)

    _dispatch.register("swiglu", "triton")(seven)  # not for CPU tensors unless forced
    assert (ops.swiglu(randn(4), randn(4)) == 7).all() and calls == [4]
    assert (ops.swiglu(randn(3), randn(3)) != 7).all() and calls == [4]
    assert (ops.swiglu(randn(4).requires_grad_(), randn(4)) != 7).all() and calls == [4]


@pytest.mark.usefixtures("no_kernels")
def test_a_forced_backend_runs_and_the_choice_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    _dispatch.register("swiglu", "cuda")(seven)
    gate, up = randn(3), randn(3)
    with ops.use_backend("cuda"):
        assert (ops.swiglu(gate, up) == 7).all()
        with ops.use_backend("torch"):
            assert (ops.swiglu(gate, up) != 7).all()
        assert (ops.swiglu(gate, up) == 7).all()
    assert (ops.swiglu(gate, up) != 7).all()
    monkeypatch.setenv("LLAMA_MM_BACKEND", "cuda")
    assert (ops.swiglu(gate, up) == 7).all()
    assert ops.available() == {"swiglu": ["cuda"]}
