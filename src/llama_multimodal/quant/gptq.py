"""GPTQ (Frantar et al. 2023, arXiv:2210.17323): round a weight so that its outputs change least on real inputs.

Columns are rounded one after the other, and the columns still to come make up for what each lost, as far as their
inputs go together with its own. Two choices of ours: the scales of all groups are fixed first, each with the reach that
costs least, so that columns can go in the order of their inputs' size and still lie in plain groups; and inputs that
were never there in calibration leave their columns to plain rounding.

Shapes: N outputs · K inputs · G values of a group · T tokens
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Format, Grid, PackedWeight

_DAMPING = 0.01  # of the mean square input, added to all of them
_MOST_DAMPING = 1.0
_COLUMNS_AT_ONCE = 128  # whose losses are handed on to the rest in one product
_REACHES = tuple(i / 20 for i in range(12, 21))  # of a group's grid, as a share of its largest values


class InputSquares:
    """Sums of x·xᵀ over the inputs of one layer, which is all that GPTQ needs of them."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.sum = torch.zeros(inputs, inputs, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """x: [..., K]"""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.sum.addmm_(rows.T, rows)
        self.tokens += len(rows)

    @property
    def mean(self) -> Tensor:
        """[K, K]"""
        return self.sum / max(1, self.tokens)


def gptq(weight: Tensor, squares: Tensor, format: Format, *, group: int, symmetric: bool) -> PackedWeight:
    """Round a weight [N, K] to int8 or int4 in the plain layout.

    squares: [K, K], the mean of x·xᵀ over its inputs

    Raises:
        ValueError: a value that is not finite, or a weight too large for its format.
    """
    if not bool(torch.isfinite(weight).all()) or not bool(torch.isfinite(squares).all()):
        raise ValueError("gptq: the weight or its inputs hold values that are not finite")
    squares = _as_if_seen(squares)
    left = weight.float().clone()  # what is still to be rounded, with the losses so far made up for
    groups = left.view(len(left), -1, group)
    grid = best_grid(groups, squares.diagonal().view(-1, group), format, symmetric)
    if bool(torch.isinf(grid.scales).any()):
        raise ValueError("gptq: the weight's values are too large for a scale in fp16")
    order = squares.diagonal().argsort(descending=True, stable=True)
    left, factor = left[:, order], _factor(squares[order][:, order])
    stored = torch.empty_like(left)
    for first in range(0, left.shape[1], _COLUMNS_AT_ONCE):
        end = min(first + _COLUMNS_AT_ONCE, left.shape[1])
        losses = left.new_empty(len(left), end - first)
        for i in range(first, end):
            of = _one_group(grid, int(order[i]) // group)
            column = left[:, i, None, None]  # [N, 1, 1]
            rounded = of.stored(column)
            stored[:, i] = rounded[:, 0, 0]
            losses[:, i - first] = (column - of.values(rounded))[:, 0, 0] / factor[i, i]
            left[:, i + 1 : end] -= losses[:, i - first, None] * factor[i, i + 1 : end]
        left[:, end:] -= losses @ factor[first:end, end:]
    return grid.packed(stored[:, order.argsort()].view(groups.shape))


def best_grid(groups: Tensor, squares: Tensor, format: Format, symmetric: bool) -> Grid:
    """For each group [N, K/G, G] the reach whose rounding costs least; squares: [K/G, G], the mean of each x²."""
    best = Grid.of(groups, format, symmetric)
    cost, reach = torch.full_like(best.zeros, torch.inf), torch.ones_like(best.zeros)
    for shrink in _REACHES:
        grid = Grid.of(groups, format, symmetric, shrink)
        costs = ((grid.values(grid.stored(groups)) - groups).square() * squares).sum(-1)
        reach = torch.where(costs < cost, shrink, reach)
        cost = torch.minimum(costs, cost)
    return Grid.of(groups, format, symmetric, reach)


def _one_group(grid: Grid, index: int) -> Grid:
    return Grid(grid.format, grid.symmetric, grid.scales[:, index, None], grid.zeros[:, index, None])


def _as_if_seen(squares: Tensor) -> Tensor:
    """Inputs that were never there count as much as others do on average: not at all would let go of their weights."""
    squares = squares.clone()
    diagonal = squares.diagonal()
    diagonal[diagonal == 0] = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return squares


def _factor(squares: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped squares; more damping where it takes that."""
    mean = squares.diagonal().mean()
    damping = _DAMPING
    while True:
        damped = squares + damping * mean * torch.eye(len(squares), device=squares.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        if damping > _MOST_DAMPING:
            raise ValueError("gptq: the inputs' squares cannot be inverted")
        damping *= 10
