"""The whole small model on the Triton kernels: logits, cached steps and gradients equal to the reference's."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from small_model import CONFIG, IMAGE, make_inputs, one_row, random_model

from llama_multimodal import ops
from llama_multimodal.cache import SelfAttentionCache
from llama_multimodal.inputs import ModelInputs
from llama_multimodal.ops import _dispatch

ROWS = [[60, 5, 9, IMAGE, 4, 33, 2], [60, 7, 11], [IMAGE, 3, IMAGE, 8]]
GRIDS: list[list[tuple[int, int]]] = [[(1, 2)], [], [(1, 1), (3, 1)]]
# The model's logits go up to 8; a step of bf16 is 1/32 there, and the interpreter cuts off where a GPU rounds.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-2, torch.bfloat16: 2.5e-1}


def some_inputs(dtype: torch.dtype, device: str) -> ModelInputs:
    return make_inputs(ROWS, GRIDS).to(device, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@torch.inference_mode()
def test_logits(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    for (op, backend), kernel in list(_dispatch._kernels.items()):
        if backend == "triton":

            def counted(*args, _op=op, _function=kernel.function, **kwargs):
                calls[_op] += 1
                return _function(*args, **kwargs)

            monkeypatch.setitem(_dispatch._kernels, (op, backend), replace(kernel, function=counted))
    model, inputs = random_model(dtype=dtype).to(device), some_inputs(dtype, device)
    ours = model(inputs).logits
    with ops.use_backend("torch"):
        expected = model(inputs).logits
    assert (ours - expected).abs().max() < TOLERANCE[dtype] and expected.abs().max() > 4
    assert set(calls) == {"rms_norm", "add_rms_norm", "apply_rope", "swiglu", "linear_gelu", "cross_attention"}


@torch.inference_mode()
def test_a_cached_step(device: str) -> None:
    model = random_model(dtype=torch.float64).to(device)
    row = one_row(some_inputs(torch.float64, device), 0)
    whole = model(row).logits
    cross = model.read_images(row)
    cache = SelfAttentionCache.allocate(CONFIG.text, 1, 7, torch.float64, device)
    parts = [
        model(
            replace(row, **{n: getattr(row, n)[:, cut] for n in ("tokens", "positions", "visible")}),
            images=cross,
            self_cache=cache,
        ).logits
        for cut in (slice(0, 5), slice(5, 6), slice(6, 7))
    ]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-12


def test_gradients(device: str) -> None:
    """Every parameter's gradient, through all the kernels that have a backward pass."""
    inputs = some_inputs(torch.float64, device)
    labels = inputs.tokens.clamp(max=CONFIG.text.vocab_size - 1).flatten()
    grads = []
    for backend in ("triton", "torch"):
        model = random_model(dtype=torch.float64).to(device)
        with ops.use_backend(backend):
            logits = model(inputs).logits.flatten(0, 1)
            ops.linear_cross_entropy(logits, torch.eye(CONFIG.text.vocab_size).to(logits), labels).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 50
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-9, atol=1e-11, msg=name)
