"""Muon: what an update looks like, and one step against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llama_multimodal.train.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 48), (2, 48, 16)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    update = orthogonal(matrices)
    strengths = torch.linalg.svdvals(update)
    assert strengths.max() < 1.3 and (strengths > 0.6).double().mean() > 0.9
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inner = left.mT @ update @ right.mT  # diagonal in the matrices' own singular vectors
    assert (inner - torch.diag_embed(torch.linalg.diagonal(inner))).abs().max() < 1e-9


def test_steps_as_torchs_own_does_but_for_its_bfloat16() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.ParameterList([torch.ones(24, 16), torch.ones(16, 16)]) for _ in range(2))
    optimizers = (
        Muon(ours, lr=0.1, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < 0.02 * (1 - b).norm()
