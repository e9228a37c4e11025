"""Adapters that add something, and what feeds the models that carry them."""

from __future__ import annotations

from typing import Any

import torch
from small_model import make_inputs, random_model
from torch import Tensor

from llama_multimodal import LoraConfig, apply_lora
from llama_multimodal.adapters.lora import adapter_pairs
from llama_multimodal.inputs import ModelInputs
from llama_multimodal.models import LanguageModel, VisionLanguageModel

INPUTS = make_inputs([[1, 2, 64, 3, 4, 5], [7, 8, 9], [64, 64, 5]], [[(1, 2)], [], [(1, 1), (2, 2)]])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.25}  # of logits of order 5


@torch.no_grad()
def fill(model: LanguageModel, name: str = "default", seed: int = 0) -> None:
    """Random values, as after a training: a new adapter adds nothing."""
    generator = torch.Generator().manual_seed(seed)
    for pair in adapter_pairs(model, name).values():
        for value, scale in ((pair.A, 0.3), (pair.B, 0.1)):
            value.copy_(scale * torch.randn(value.shape, generator=generator, dtype=torch.float64))
        if pair.magnitude is not None:
            pair.magnitude.mul_(1 + 0.2 * torch.randn(pair.magnitude.shape, generator=generator))


def adapted(
    dtype: torch.dtype = torch.float64, *, seed: int = 0, name: str = "default", **config: Any
) -> VisionLanguageModel:
    """A small model with one random adapter."""
    model = random_model(dtype=dtype)
    add(model, name, seed, **config)
    return model


def add(model: LanguageModel, name: str, seed: int = 0, **config: Any) -> None:
    apply_lora(model, LoraConfig(**{"rank": 4, "alpha": 8, "targets": "all-linear", "dtype": "model", **config}), name)
    fill(model, name, seed)


@torch.no_grad()
def logits(model: LanguageModel, inputs: ModelInputs = INPUTS) -> Tensor:
    """Of real tokens: [tokens, vocab]"""
    found = model(inputs).logits
    return torch.cat([found[row, :length] for row, length in enumerate(inputs.lengths)])


def differ(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())
