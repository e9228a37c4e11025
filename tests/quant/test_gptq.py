"""GPTQ: exact where it must be, and closer to the plain outputs than rounding to the nearest, on real weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llama_multimodal import load, ops
from llama_multimodal.calibration import WORLD, calibration_rows
from llama_multimodal.errors import ConfigError
from llama_multimodal.inputs import ModelInputs
from llama_multimodal.models.layers import PackedLinear
from llama_multimodal.ops import Format
from llama_multimodal.quant.calibrate import pack_calibrated
from llama_multimodal.quant.gptq import InputSquares, gptq
from llama_multimodal.quant.pack import Packing, pack, packable_layers


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squares_of(x: Tensor) -> Tensor:
    sums = InputSquares(x.shape[-1], x.device)
    sums.add(x[:30])
    sums.add(x[30:])
    return sums.mean


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("format", "group"), [("int4", 16), ("int4", 64), ("int8", 32)])
def test_outputs_change_less_than_by_rounding_to_the_nearest(format: Format, group: int, symmetric: bool) -> None:
    x = randn(500, 192, seed=1) @ randn(192, 192, seed=2) * (0.1 + 3 * torch.rand(192))
    weight = randn(40, 192) * 0.1
    packed = gptq(weight, squares_of(x), format, group=group, symmetric=symmetric)
    nearest = ops.pack_weight(weight, format, group=group, symmetric=symmetric)
    assert (packed.shape, packed.group, packed.format) == (nearest.shape, nearest.group, nearest.format)
    assert all(t.dtype == nearest.tensors()[name].dtype for name, t in packed.tensors().items())
    change, usual = ((x @ (ops.unpack_weight(p) - weight).T).norm() for p in (packed, nearest))
    assert change < 0.8 * usual


def test_inputs_that_do_not_go_together_leave_the_nearest_values_of_the_grid() -> None:
    """With squares that are diagonal nothing can make up for anything: each value is the nearest of its group's."""
    weight = randn(8, 64)
    packed = gptq(weight, torch.eye(64), "int4", group=32, symmetric=False)
    values = ops.unpack_weight(packed).view(8, 2, 32)
    assert packed.scales is not None and packed.zeros is not None
    scales, zeros = packed.scales.float()[..., None], packed.zeros.float()[..., None]
    grid = (torch.arange(16.0) - zeros) * scales  # [8, 2, 16]
    nearest = (weight.view(8, 2, 32, 1) - grid[:, :, None]).abs().amin(-1)
    torch.testing.assert_close((weight.view(8, 2, 32) - values).abs(), nearest, atol=1e-6, rtol=0)


def test_inputs_that_were_never_there() -> None:
    x = randn(100, 64)
    x[:, 10:20] = 0
    packed = gptq(randn(8, 64), squares_of(x), "int4", group=32, symmetric=True)
    assert (ops.unpack_weight(packed) - randn(8, 64))[:, 10:20].abs().max() < 0.5
    with pytest.raises(ValueError, match="not finite"):
        gptq(randn(8, 64), squares_of(x) * torch.nan, "int4", group=32, symmetric=True)


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> list[ModelInputs]:
    pytest.importorskip("font_roboto")
    _, processor = load("tiny", device="meta")
    return calibration_rows(WORLD, processor, 20).rows


@torch.no_grad()
def logits_of(model: Any, rows: list[ModelInputs]) -> Tensor:
    logits = torch.cat([model(row).logits[0] for row in rows])
    return logits - logits.mean(-1, keepdim=True)


def test_the_embedded_model_changes_less_than_by_rounding_to_the_nearest(rows: list[ModelInputs]) -> None:
    """On rows that it was not calibrated on; with and without images, through gated and plain blocks."""
    packing = Packing("int4", 32, lm_head="int8")
    assert any(row.images for row in rows[:14])
    model, _ = load("tiny", dtype="fp32")
    plain = logits_of(model, rows[14:])
    seen: list[tuple[int, int]] = []
    pack_calibrated(model, packing, rows[:14], lambda *at: seen.append(at))
    assert seen == [(i, 8) for i in range(1, 9)]
    assert all(isinstance(model.get_submodule(path), PackedLinear) for path in packable_layers(model))
    nearest = pack(load("tiny", dtype="fp32")[0], packing)
    change, usual = ((logits_of(packed, rows[14:]) - plain).norm() for packed in (model, nearest))
    assert change < 0.9 * usual


def test_requests_that_do_not_go() -> None:
    model, _ = load("tiny")
    with pytest.raises(ConfigError, match="GPTQ rounds to int8 or int4, not to fp8"):
        pack_calibrated(model, Packing("fp8"), [])
    with pytest.raises(ConfigError, match="needs calibration rows"):
        pack_calibrated(model, Packing("int4"), [])
    with pytest.raises(ConfigError, match="packed already"):
        pack_calibrated(pack(model, "int8"), Packing("int4"), [])
