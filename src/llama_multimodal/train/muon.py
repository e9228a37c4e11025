"""Muon (Jordan 2024): momentum whose singular values are all made about 1, for the matrices of the blocks.

torch's own computes in bfloat16, which a CPU without bf16 arithmetic only emulates: a step of this project's small
model took 4 to 9 s there, ten times its forward and backward pass. Here matrices of one shape go through batched
products in the dtype of their weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic whose repetition drives singular values to about 1
_REPETITIONS = 5
_RMS = 0.2  # of an update before the learning rate: about AdamW's, so that one rate serves both


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; weight decay is decoupled. Every parameter must be a matrix."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("Muon evaluates no closure")
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                average = state["momentum"]
                average.lerp_(weight.grad, 1 - group["momentum"])
                alike[tuple(weight.shape)].append((weight, weight.grad.lerp(average, group["momentum"])))
            for shape, members in alike.items():
                updates = orthogonal(torch.stack([direction for _, direction in members]))
                size = group["lr"] * _RMS * max(shape) ** 0.5
                for (weight, _), update in zip(members, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=size)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [N, rows, columns] with their singular vectors kept and their singular values brought near 1."""
    a, b, c = _COEFFICIENTS
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(_REPETITIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x
