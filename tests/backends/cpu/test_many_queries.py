"""Attention of many queries on CPUs, on every instruction set that has it, against fp64, and what is left to torch.

Shapes: B batch · H query heads · Hkv key heads · T queries · S keys · D head dim
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.ops.backends.cpu import attention as module
from llama_multimodal.ops.backends.cpu import library

from ..references import close, name_of, randn
from .conftest import Guards

BF16 = torch.bfloat16


@pytest.fixture(params=[torch.float32, BF16], ids=name_of)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=["amx, bf16 tiles", "avx512, bf16 pairs", "avx512, fp32", "avx2, fp32"])
def kernel(request: pytest.FixtureRequest, cpu: None) -> Iterator[None]:
    """The test runs on each kernel that this machine has, the one that it would choose or not."""
    before, (name, products) = library.instruction_set(), request.param.split(", ")
    if not library.use_instruction_set(name) or library.functions().use_pairs(products == "bf16 pairs"):
        pytest.skip(f"this machine has no {request.param}")
    yield
    library.use_instruction_set(before)
    library.functions().use_pairs(-1)


def inputs(b: int, h: int, kv: int, t: int, s: int, d: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with a model's strides: heads side by side in a token, slots that are not used behind each row's."""
    shapes = ((b, t + 2, h, d), (b, s + 3, kv, d), (b, s + 3, kv, d))
    q, k, v = (randn(*shape, dtype=dtype, seed=seed).transpose(1, 2) for seed, shape in enumerate(shapes))
    return q[:, :, :t], k[:, :, :s], v[:, :, :s]


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, bias: Tensor | None = None) -> Tensor:
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    if bias is not None:
        scores = scores + bias.double()
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ v


# A task is up to 96 queries in sixes, or up to 256 in 64s; a block 256 keys, in sixteens, 32s and 64s; the dim is
# padded to 16 or 32.
SHAPES = [
    (2, 4, 2, 1, 70, 64),
    (1, 1, 1, 16, 1, 1),
    (1, 2, 2, 17, 15, 7),
    (2, 4, 2, 18, 16, 16),
    (1, 6, 3, 96, 64, 36),
    (2, 3, 1, 97, 65, 64),
    (1, 4, 4, 101, 255, 80),
    (1, 4, 2, 190, 257, 96),
    (2, 2, 1, 200, 530, 112),
    (1, 8, 2, 33, 700, 128),
    (1, 5, 5, 20, 300, 200),
    (1, 1, 1, 20, 70, 300),
    (1, 13, 13, 700, 300, 48),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_fp64(shape: tuple[int, ...], kernel: None, dtype: torch.dtype, guards: Guards, threads: None) -> None:
    q, k, v = map(guards.input, inputs(*shape, dtype))
    close(ops.attention(q, k, v), reference(q, k, v), dtype)
    bias = randn(shape[4], seed=5)
    bias[1::3] = -math.inf
    bias = guards.input(bias)
    close(ops.attention(q, k, v, key_bias=bias), reference(q, k, v, bias=bias), dtype)


@pytest.mark.parametrize("tokens", [16, 96, 97, 256, 300, 523])
def test_causal(tokens: int, kernel: None, dtype: torch.dtype, guards: Guards, threads: None) -> None:
    q, k, v = map(guards.input, inputs(2, 4, 2, tokens, tokens, 64, dtype))
    close(ops.attention(q, k, v, causal=True), reference(q, k, v, causal=True), dtype)
    bias = randn(tokens)
    ours = ops.attention(q, k, v, causal=True, key_bias=bias)
    close(ours, reference(q, k, v, causal=True, bias=bias), dtype)


def test_a_bias_has_more_digits_than_bf16(kernel: None) -> None:
    """n equal keys and one that counts n times, for an n whose logarithm bf16 would round away."""
    n = 1601
    q, k, v = inputs(1, 2, 2, 20, 40, 80)
    bias = torch.zeros(40)
    bias[-1] = math.log(n)
    many = [torch.cat((x, x[:, :, -1:].expand(-1, -1, n - 1, -1)), dim=2) for x in (k, v)]
    close(ops.attention(q, k, v, key_bias=bias), reference(q, *many), BF16)


def test_scores_far_apart(kernel: None) -> None:
    """The largest comes last, in a block of its own, and before it everything underflows."""
    q, k, v = inputs(1, 1, 1, 16, 600, 64)
    k[:, :, -1] = 40 * q[:, :, 3]
    close(ops.attention(30 * q, k, v), reference(30 * q, k, v), BF16)


def test_a_nan_stays(kernel: None) -> None:
    q, k, v = inputs(1, 2, 2, 18, 300, 64)
    q, k = q.clone(), k.clone()
    q[0, 1, 4, 7] = math.nan
    out = ops.attention(q, k, v)
    assert out[0, 1, 4].isnan().all() and out.isnan().sum() == 64
    k[0, 0, 290, 3] = math.nan
    assert ops.attention(q, k, v)[0, 0].isnan().all()


def test_where_nothing_is_seen_is_zero(kernel: None) -> None:
    q, k, v = inputs(1, 2, 2, 16, 70, 64)
    assert (ops.attention(q, k, v, key_bias=torch.full((70,), -math.inf)) == 0).all()


def test_gaps_within_heads(kernel: None) -> None:
    q, k, v = (randn(1, 2, 20, 64, dtype=BF16, seed=seed)[..., ::2] for seed in range(3))
    close(ops.attention(q, k, v), reference(q, k, v), BF16)


def test_the_heads_of_the_result_lie_side_by_side(kernel: None) -> None:
    assert ops.attention(*inputs(2, 4, 2, 20, 30, 64)).transpose(1, 2).is_contiguous()


def test_opcheck(kernel: None) -> None:
    q, k, v = inputs(1, 2, 1, 20, 30, 16)
    torch.library.opcheck(torch.ops.llama_mm.cpu_attention.default, (q, k, v, False, randn(30)))


def test_what_is_left_to_torch(cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries, masks, other dtypes; and everything where the instruction set has no kernel."""
    if not library.has_attention(BF16):
        pytest.skip("this machine has no such kernel")
    taken = []
    monkeypatch.setattr(module, "cpu_attention", lambda q, *_: taken.append(q) or q)
    q, k, v = inputs(1, 2, 2, 20, 20, 16)
    ops.attention(q, k, v)
    assert len(taken) == 1
    ops.attention(q[:, :, :15], k, v)
    ops.attention(q[:, :, :1], k, v)  # a step of decoding
    ops.attention(q, k, v, mask=torch.ones(1, 1, 20, 20, dtype=torch.bool))
    ops.attention(q.half(), k.half(), v.half())
    ops.attention(q, k[:, :, :0], v[:, :, :0])
    before = library.instruction_set()
    assert library.use_instruction_set("plain")
    ops.attention(q, k, v)
    library.use_instruction_set(before)
    assert len(taken) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": (1, 2, 19, 16)}, "k has shape (1, 2, 20, 16), and v (1, 2, 19, 16); takes the same"),
        ({"q": (1, 2, 20, 8)}, "q has a head dim of 8, and k of 16"),
        ({"q": (1, 3, 20, 16)}, "3 query heads cannot share 2 key heads evenly"),
        ({"q": (2, 2, 20, 16)}, "q has shape (2, 2, 20, 16) and k (1, 2, 20, 16)"),
        ({"q": (1, 2, 21, 16), "causal": True}, "causal takes as many queries as keys"),
        ({"key_bias": (19,)}, "key_bias has shape (19,), and k 20 keys"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_shapes_that_do_not_go_together(change: dict[str, object], message: str, kernel: None) -> None:
    given: dict[str, object] = {name: torch.zeros(1, 2, 20, 16, dtype=BF16) for name in "qkv"}
    for name, value in change.items():
        given[name] = torch.zeros(value, dtype=BF16) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        ops.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)  # type: ignore[arg-type]
