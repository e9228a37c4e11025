"""The whole small model on a GPU: its logits on every backend are those of the reference."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import pytest
import torch
from small_model import IMAGE, make_inputs, random_model
from torch import Tensor

from llama_multimodal import generate, ops
from llama_multimodal.sampling import SamplingParams

# Up to eight tokens a row: CUDA's cross-attention takes no more.
ROWS = [[60, 5, 9, IMAGE, 4, 33, 2], [60, 7, 11], [IMAGE, 3, IMAGE, 8]]
GRIDS: list[list[tuple[int, int]]] = [[(1, 2)], [], [(1, 1), (3, 1)]]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2.5e-1}
"""Of logits up to 8."""


@functools.cache
@torch.inference_mode()
def expected() -> Tensor:
    """By the reference, in fp64 on the CPU."""
    with ops.use_backend("torch"):
        return random_model(dtype=torch.float64)(make_inputs(ROWS, GRIDS)).logits


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@torch.inference_mode()
def test_logits(dtype: torch.dtype, backend: str) -> None:
    model, inputs = random_model(dtype=dtype).to("cuda"), make_inputs(ROWS, GRIDS).to("cuda", dtype)
    difference = (model(inputs).logits.double().cpu() - expected()).abs().max()
    assert difference < TOLERANCE[dtype] and expected().abs().max() > 4


def test_generated_tokens(backend: str) -> None:
    model, inputs = random_model().to("cuda"), make_inputs(ROWS, GRIDS).to("cuda", torch.float32)
    greedy = SamplingParams(max_new_tokens=12, temperature=0.0)
    ours = generate(model, inputs, greedy).token_ids
    with ops.use_backend("torch"):
        assert ours == generate(model, inputs, greedy).token_ids


@pytest.mark.parametrize("name", ["triton", None], ids=["triton", "by itself"])
def test_gradients(name: str | None) -> None:
    """Left to itself the dispatch mixes backends: CUDA's attention has no backward pass."""
    inputs, gradients = make_inputs(ROWS, GRIDS).to("cuda", torch.float32), []
    for backend in (name, "torch"):
        model = random_model().to("cuda")
        with ops.use_backend(backend) if backend else nullcontext():
            model(inputs).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 50
    for parameter, grad in gradients[0].items():
        reference = gradients[1][parameter]
        torch.testing.assert_close(grad, reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max()), msg=parameter)
