"""A whole model on the CUDA kernels against the same one on torch's: logits and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_model import CONFIG, IMAGE, make_inputs, one_row, random_model

from llama_multimodal import ops
from llama_multimodal.cache import SelfAttentionCache
from llama_multimodal.ops import _dispatch

ROWS = [[60, 5, 9, IMAGE, 4, 33, 2], [60, 7, 11]]
GRIDS: list[list[tuple[int, int]]] = [[(1, 2)], []]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_logits_are_those_of_the_reference(dtype: torch.dtype) -> None:
    model, inputs = random_model(dtype=dtype), make_inputs(ROWS, GRIDS)
    with torch.inference_mode():
        ours = model(inputs).logits
        with ops.use_backend("torch"):
            expected = model(inputs).logits
    scale = float(expected.float().abs().max())
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.usefixtures("cuda")
@torch.inference_mode()
def test_cached_steps_are_those_of_the_reference() -> None:
    """A prompt, and two tokens after it: attention over both caches."""
    model, row = random_model(dtype=torch.float32), one_row(make_inputs(ROWS, GRIDS), 0)
    with ops.use_backend("torch"):
        expected = model(row).logits
    cross = model.read_images(row)
    cache = SelfAttentionCache.allocate(CONFIG.text, 1, 7, torch.float32, "cpu")
    for cut in (slice(0, 5), slice(5, 6), slice(6, 7)):
        part = replace(row, **{name: getattr(row, name)[:, cut] for name in ("tokens", "positions", "visible")})
        ours = model(part, images=cross, self_cache=cache).logits
        torch.testing.assert_close(ours, expected[:, cut], rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_gradients_are_those_of_the_reference(
    shim_library: Path, attach: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not forced: the attention of decoding has no backward, and is left to torch here."""
    attach(shim_library)
    monkeypatch.setitem(_dispatch._AUTOMATIC, "cpu", ("cuda",))
    assert "cuda" in ops.available()["rms_norm"]
    model, inputs = random_model(dtype=torch.float32), make_inputs(ROWS, GRIDS)
    parameters = dict(model.named_parameters())
    ours = torch.autograd.grad(model(inputs).logits.square().mean(), parameters.values(), allow_unused=True)
    with ops.use_backend("torch"):
        expected = torch.autograd.grad(model(inputs).logits.square().mean(), parameters.values(), allow_unused=True)
    for name, a, b in zip(parameters, ours, expected):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()), msg=name)
