"""rms_norm, add_rms_norm, swiglu and apply_rope, on every instruction set, against fp64.

Shapes: B batch · H heads · T tokens · D head dim · P rows of a table
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.ops.backends.cpu import elementwise

from .. import references
from ..references import close, randn
from .conftest import Guards

DTYPES = (torch.float32, torch.bfloat16)
# Less than a vector of any instruction set, a few and some more, and what is worth several threads.
SHAPES = [(1, 1), (3, 7), (2, 5, 33), (4, 64), (37, 1030), (120, 2048)]


@pytest.fixture(autouse=True)
def where_models_answer() -> Iterator[None]:
    with torch.no_grad():
        yield


def odd(x: Tensor) -> Tensor:
    """The same values with a gap behind each."""
    return torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=references.name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(
    shape: tuple[int, ...], dtype: torch.dtype, instruction_set: str, guards: Guards, threads: None
) -> None:
    x, residual = (guards.input(randn(*shape, dtype=dtype, seed=seed)) for seed in (0, 1))
    weight = guards.input(randn(shape[-1], dtype=dtype, seed=2))
    close(ops.rms_norm(x, weight, 1e-3), references.rms_norm(x, weight, 1e-3), dtype)
    assert torch.equal(ops.rms_norm(odd(x), odd(weight), 1e-3), ops.rms_norm(x, weight, 1e-3))
    normed, summed = ops.add_rms_norm(x, residual, weight, 1e-3)
    assert torch.equal(summed, x + residual)
    close(normed, references.rms_norm(summed, weight, 1e-3), dtype)
    again = ops.add_rms_norm(odd(x), odd(residual), weight, 1e-3)
    assert torch.equal(again[0], normed) and torch.equal(again[1], summed)


def test_a_row_with_nan_or_inf_spoils_no_other(instruction_set: str) -> None:
    x = randn(4, 70)
    x[1, 3], x[2, 69] = torch.nan, torch.inf
    found = ops.rms_norm(x, torch.ones(70), 1e-5)
    assert found[1].isnan().all() and found[2, 69].isnan() and found[[0, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=references.name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu(
    shape: tuple[int, ...], dtype: torch.dtype, instruction_set: str, guards: Guards, threads: None
) -> None:
    gate, up = (guards.input(4 * randn(*shape, dtype=dtype, seed=seed)) for seed in (0, 1))
    expected = references.swiglu(gate, up)
    found = ops.swiglu(gate, up)
    close(found / 16, expected / 16, dtype)
    assert torch.equal(ops.swiglu(odd(gate), odd(up)), found)
    assert torch.equal(ops.swiglu(guards.input(torch.cat((gate, up), dim=-1))), found)


@pytest.mark.parametrize("dtype", DTYPES, ids=references.name_of)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (2, 3, 1, 5, 34), (2, 6, 2, 130, 64)], ids=str)
def test_apply_rope(
    shape: tuple[int, ...], dtype: torch.dtype, instruction_set: str, guards: Guards, threads: None
) -> None:
    batch, heads, kv_heads, tokens, dim = shape
    q = guards.input(randn(batch, heads, tokens, dim, dtype=dtype))
    k = guards.input(randn(batch, kv_heads, tokens, dim, dtype=dtype, seed=1))
    table = 3 * randn(200, dim // 2, seed=2)
    cos, sin = guards.input(table.cos()), guards.input(table.sin())
    positions = torch.randint(200, (batch, tokens), generator=torch.Generator().manual_seed(3))
    expected = [references.apply_rope(x, cos[positions], sin[positions], False) for x in (q, k)]
    by_table = ops.apply_rope(q, k, cos, sin, positions)
    for found, wanted in zip(by_table, expected, strict=True):
        close(found, wanted, dtype)
    as_products_leave_them = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    for others in (
        ops.apply_rope(q, k, guards.input(cos[positions]), guards.input(sin[positions])),
        ops.apply_rope(*as_products_leave_them, cos, sin, positions),
    ):
        assert all(torch.equal(found, other) for found, other in zip(by_table, others, strict=True))
    one = ops.apply_rope(q, k, cos[None, :tokens], sin[None, :tokens])  # the same for all rows
    close(one[0], references.apply_rope(q, cos[None, :tokens], sin[None, :tokens], False), dtype)


def test_a_position_outside_of_the_table(instruction_set: str) -> None:
    q, table = randn(1, 2, 3, 8), torch.zeros(5, 4)
    for outside in (5, -1):
        with pytest.raises(IndexError, match="outside of the table's 5 rows"):
            ops.apply_rope(q, q, table, table, torch.tensor([[0, outside, 1]]))


def test_what_is_left_to_torch(cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other dtypes, nothing at all, pairs side by side, and all where gradients are recorded."""
    for name in ("cpu_rms_norm", "cpu_swiglu", "cpu_apply_rope"):
        monkeypatch.setattr(elementwise, name, None)
    weight, angles = torch.ones(8), torch.zeros(1, 3, 4)
    ops.rms_norm(randn(3, 8).half(), weight.half(), 1e-5)
    ops.rms_norm(randn(3, 8, dtype=torch.bfloat16), weight, 1e-5)
    ops.swiglu(torch.empty(0, 8))
    ops.apply_rope(*(randn(1, 2, 3, 8).double(),) * 2, angles.double(), angles.double())
    ops.apply_rope(*(randn(1, 2, 3, 8),) * 2, angles, angles, interleaved=True)
    with torch.enable_grad():
        ops.rms_norm(randn(3, 8), weight, 1e-5)
        ops.swiglu(randn(3, 8))


def test_they_are_ops(cpu: None) -> None:
    x, heads, angles = randn(5, 16), randn(2, 3, 4, 8), randn(2, 4, 4)
    for op, args in (
        (elementwise.cpu_rms_norm, (x, x[0].clone(), 1e-5)),
        (elementwise.cpu_add_rms_norm, (x, x + 1, x[0].clone(), 1e-5)),
        (elementwise.cpu_swiglu, (x, None)),
        (elementwise.cpu_swiglu, (x, x + 1)),
        (elementwise.cpu_apply_rope, (heads, heads, angles.cos(), angles.sin(), None)),
    ):
        torch.library.opcheck(op, args)
