"""apply_rope in CUDA C++ against fp64, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.config import RopeScaling
from llama_multimodal.errors import DeviceError

from .. import references
from ..references import FLOATS, close, name_of, randn
from .conftest import Guards

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
each_layout = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
SHAPES = [(1, 1, 1, 1, 2), (2, 3, 1, 5, 6), (2, 4, 2, 3, 64), (1, 32, 8, 2, 128), (3, 5, 5, 1, 80), (1, 2, 1, 2, 1100)]
"""B, H, Hkv, T, D"""


def angles(batch: int, tokens: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """cos and sin of each token, and the positions they belong to."""
    positions = torch.randint(0, 90, (batch, tokens), generator=torch.Generator().manual_seed(dim))
    frequencies = ops.rope_frequencies(dim, 10000.0, RopeScaling(original_max_position_embeddings=64))
    return *ops.rope_angles(positions, frequencies), positions


@each_dtype
@each_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(dtype: torch.dtype, interleaved: bool, shape: Any, order: None, guards: Guards) -> None:
    batch, heads, kv_heads, tokens, dim = shape
    q, k = randn(batch, heads, tokens, dim, dtype=dtype), randn(batch, kv_heads, tokens, dim, dtype=dtype, seed=1)
    q, k = guards.input(q).requires_grad_(), guards.input(k).requires_grad_()
    cos, sin, _ = angles(batch, tokens, dim)
    cos, sin = guards.input(cos), guards.input(sin)
    ours = ops.apply_rope(q, k, cos, sin, interleaved=interleaved)
    grads = [guards.input(randn(*x.shape, dtype=dtype, seed=2)) for x in ours]
    for out, x, got, grad in zip(ours, (q, k), torch.autograd.grad(ours, (q, k), grads), grads):
        close(out, references.apply_rope(x.detach(), cos, sin, interleaved), dtype)
        close(got, references.apply_rope(grad, cos, -sin, interleaved), dtype)


@pytest.mark.usefixtures("cuda")
@each_dtype
@each_layout
@pytest.mark.parametrize("dim", [16, 12, 64])
def test_any_place_in_memory(dtype: torch.dtype, interleaved: bool, dim: int, guards: Guards) -> None:
    """Heads of one packed product, transposed; columns apart; memory and tables that are not aligned."""
    packed = guards.input(randn(2, 3, 7 * dim, dtype=dtype), offset=1 if dim == 64 else 0)
    heads = packed.unflatten(-1, (7, dim)).transpose(1, 2)  # [2, 7, 3, dim]
    q, k = heads[:, :4], heads[:, 4:6]
    cos, sin, _ = angles(2, 3, dim)
    wide = guards.input(torch.stack((cos, sin), 2))  # [2, 3, 2, dim/2]
    for some_cos, some_sin in ((wide[:, :, 0], wide[:, :, 1]), (guards.input(cos, offset=1), guards.input(sin))):
        for x, got in zip((q, k), ops.apply_rope(q, k, some_cos, some_sin, interleaved=interleaved)):
            close(got, references.apply_rope(x, cos, sin, interleaved), dtype)
    apart = guards.input(randn(2, 4, 3, dim, 2, dtype=dtype))[..., 1]
    ours = ops.apply_rope(apart, k, cos[:1], sin[:1], interleaved=interleaved)  # one row's angles for both
    close(ours[0], references.apply_rope(apart, cos[:1], sin[:1], interleaved), dtype)


@pytest.mark.usefixtures("cuda")
@each_layout
@pytest.mark.parametrize("dim", [6, 64])
def test_a_table_and_positions(interleaved: bool, dim: int, guards: Guards) -> None:
    q, k = guards.input(randn(2, 4, 3, dim)), guards.input(randn(2, 2, 3, dim, seed=1))
    table = ops.rope_angles(torch.arange(90)[None], ops.rope_frequencies(dim, 10000.0, None))
    cos, sin = (guards.input(x[0]) for x in table)
    positions = guards.input(torch.tensor([[0, 89, 7], [-1, 3, 3]]).t().contiguous()).t()  # neither contiguous
    ours = ops.apply_rope(q, k, cos, sin, positions, interleaved=interleaved)
    for x, got in zip((q, k), ours):
        close(got, references.apply_rope(x, cos[positions], sin[positions], interleaved), torch.float32)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("position", [5, -6, 2**40])
def test_a_position_outside_the_table_is_nan_and_touches_nothing_else(position: int, guards: Guards) -> None:
    q, k, table = randn(1, 2, 3, 8), randn(1, 1, 3, 8), guards.input(randn(5, 4))
    ours = ops.apply_rope(q, k, table, table, torch.tensor([[0, position, 4]]))
    for x in ours:
        assert x[:, :, 1].isnan().all() and x[:, :, ::2].isfinite().all()


@pytest.mark.usefixtures("cuda")
def test_no_tokens() -> None:
    q, k = ops.apply_rope(torch.empty(1, 2, 0, 8), torch.empty(1, 1, 0, 8), torch.empty(1, 0, 4), torch.empty(1, 0, 4))
    assert q.shape == (1, 2, 0, 8) and k.shape == (1, 1, 0, 8)


REFUSED = {
    "odd head dim": ({"q": randn(1, 2, 3, 7), "k": randn(1, 2, 3, 7)}, "with an even D"),
    "other tokens": ({"k": randn(1, 2, 4, 8)}, r"q has shape \[1, 2, 3, 8\], k \[1, 2, 4, 8\]"),
    "rank": ({"q": randn(2, 3, 8)}, r"takes \[B, H, T, D\] and \[B, Hkv, T, D\]"),
    "half tables": ({"cos": randn(1, 3, 4, dtype=torch.bfloat16)}, "cos is torch.bfloat16 on cpu; takes float32"),
    "narrow": ({"sin": randn(1, 3, 2)}, r"sin has shape \[1, 3, 2\]; takes \[B, T, D/2\], here \[1, 3, 4\]"),
    "no table": ({"positions": torch.zeros(1, 3).long()}, r"with positions it takes a table \[P, D/2\], D/2 = 4"),
    "int32 positions": (
        {"cos": randn(9, 4), "sin": randn(9, 4), "positions": torch.zeros(1, 3).int()},
        r"positions is torch.int32 \[1, 3\]; takes int64 \[B, T\]",
    ),
    "learned angles": ({"cos": randn(1, 3, 4).requires_grad_()}, "cos wants a gradient"),
    "mixed": ({"q": randn(1, 2, 3, 8, dtype=torch.float16)}, "k is torch.float32, q torch.float16; takes one dtype"),
}


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    changed, message = REFUSED[case]
    given = {"q": randn(1, 2, 3, 8), "k": randn(1, 2, 3, 8), "cos": randn(1, 3, 4), "sin": randn(1, 3, 4)} | changed
    with pytest.raises(DeviceError, match=f'apply_rope on backend "cuda": .*{message}'):
        ops.apply_rope(**given)


@pytest.mark.usefixtures("cuda")
def test_double_backward() -> None:
    q, k = randn(1, 1, 2, 4).requires_grad_(), randn(1, 1, 2, 4)
    cos, sin, _ = angles(1, 2, 4)
    out, _ = ops.apply_rope(q, k, cos, sin)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), q)
    torch.testing.assert_close(second, torch.full_like(q, 2), rtol=1e-5, atol=1e-5)  # a turn keeps lengths
    assert math.isclose(float(out.detach().norm()), float(q.detach().norm()), rel_tol=1e-5)
