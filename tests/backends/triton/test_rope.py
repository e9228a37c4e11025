"""Rotary embedding against complex numbers in fp64: layouts, tables, strides, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends.references import FLOATS, apply_rope, close, name_of, poisoned, randn
from llama_multimodal import ops

each_dtype = pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=name_of)
each_layout = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
SHAPES = [(1, 1, 1, 1, 2), (2, 3, 1, 5, 6), (2, 4, 2, 7, 34), (1, 9, 3, 4, 80), (3, 40, 8, 2, 128)]
"""batch, heads, key heads, tokens, head dim"""


def angles(*shape: int, dtype: torch.dtype, device: str, seed: int = 5) -> tuple[Tensor, Tensor]:
    turn = 3 * randn(*shape, dtype=torch.float64, seed=seed, device=device)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return turn.cos().to(kept), turn.sin().to(kept)


@each_dtype
@each_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_apply_rope(dtype: torch.dtype, interleaved: bool, shape: tuple[int, ...], device: str) -> None:
    b, h, kv, t, d = shape
    q = randn(b, t, h, d, dtype=dtype, device=device).transpose(1, 2)
    k = poisoned(randn(b, kv, t, d, dtype=dtype, seed=1, device=device))
    cos, sin = angles(b, t, d // 2, dtype=dtype, device=device)
    q_out, k_out = ops.apply_rope(q, k, cos, sin, interleaved=interleaved)
    close(q_out, apply_rope(q, cos, sin, interleaved), dtype)
    close(k_out, apply_rope(k, cos, sin, interleaved), dtype)
    assert q_out.stride() == q.stride()


@each_dtype
@each_layout
def test_a_table_and_positions(dtype: torch.dtype, interleaved: bool, device: str) -> None:
    q, k = (randn(2, h, 5, 6, dtype=dtype, seed=h, device=device) for h in (3, 1))
    cos, sin = angles(11, 3, dtype=dtype, device=device)
    positions = torch.tensor([[0, 3, 10, 3, 1], [10, 9, 8, 7, 6]], device=device)
    q_out, k_out = ops.apply_rope(q, k, cos, sin, positions, interleaved=interleaved)
    close(q_out, apply_rope(q, cos[positions], sin[positions], interleaved), dtype)
    close(k_out, apply_rope(k, cos[positions], sin[positions], interleaved), dtype)


def test_angles_for_all_rows_alike(device: str) -> None:
    q, k = (randn(3, h, 5, 6, seed=h, device=device) for h in (2, 1))
    cos, sin = angles(1, 5, 3, dtype=torch.float32, device=device)
    q_out, _ = ops.apply_rope(q, k, cos, sin)
    close(q_out, apply_rope(q, cos.expand(3, 5, 3), sin.expand(3, 5, 3), False), torch.float32)


def test_a_position_outside_the_table(device: str) -> None:
    q, k = (randn(1, h, 3, 4, seed=h, device=device) for h in (2, 1))
    cos, sin = angles(4, 2, dtype=torch.float32, device=device)
    for wrong in (-1, 4):
        positions = torch.tensor([[0, wrong, 3]], device=device)
        if device == "cpu":
            with pytest.raises(IndexError, match=rf"positions run from .*{wrong}.*; takes 0 to 3"):
                ops.apply_rope(q, k, cos, sin, positions)
        else:  # a GPU does not wait to look: the token's values are NaN, the others right
            for out in ops.apply_rope(q, k, cos, sin, positions):
                assert out[:, :, 1].isnan().all() and out[:, :, ::2].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("interleaved, table", [(False, False), (True, True)], ids=["half", "interleaved table"])
def test_gradients(interleaved: bool, table: bool, device: str) -> None:
    q, k = (randn(1, h, 2, 4, dtype=torch.float64, seed=h, device=device).requires_grad_() for h in (2, 1))
    cos, sin = angles(*((7, 2) if table else (1, 2, 2)), dtype=torch.float64, device=device)
    positions = torch.tensor([[6, 2]], device=device) if table else None
    assert torch.autograd.gradcheck(
        lambda q, k: ops.apply_rope(q, k, cos, sin, positions, interleaved=interleaved), (q, k)
    )


def test_the_gradient_of_one_output_alone(device: str) -> None:
    q, k = (randn(1, h, 3, 6, seed=h, device=device).requires_grad_() for h in (2, 1))
    cos, sin = angles(1, 3, 3, dtype=torch.float32, device=device)
    (grad,) = torch.autograd.grad(ops.apply_rope(q, k, cos, sin)[1].sum(), k)
    leaf = k.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(apply_rope(leaf, cos, sin, False).sum(), leaf)
    close(grad, expected, torch.float32)
