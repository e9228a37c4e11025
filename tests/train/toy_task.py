"""A small task for tests of the loop: numbers into classes, drawn from the seed, with dropout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_multimodal.train.config import Recipe
from llama_multimodal.train.optim import build_optimizers, scheduled
from llama_multimodal.train.parallel import Group
from llama_multimodal.train.task import Task, sums, trained


@dataclass(frozen=True, kw_only=True)
class ToyRecipe(Recipe):
    TASK = "toy"
    rows: int = 8
    rows_at_once: int = 4
    dropout: float = 0.1
    loss_scale: float = 1.0
    poison: tuple[int, int] | None = None  # step and row whose numbers are not finite
    evaluate_every: int = 0
    scores: tuple[float, ...] = ()  # of the evaluations, in their order
    threads: int | None = 1

    def task(self, group: Group) -> Task:
        return ToyTask(self, group)


@dataclass(frozen=True)
class ToyBatch:
    x: Tensor
    labels: Tensor
    names: list[str]


class ToyTask(Task[ToyBatch]):
    num_sums = 1
    relief = "take fewer rows"

    def __init__(self, recipe: ToyRecipe, group: Group) -> None:
        self.recipe, self.group, self.device = recipe, group, torch.device("cpu")
        torch.manual_seed(recipe.seed)
        self.modules = nn.Sequential(nn.Linear(8, 16), nn.Dropout(recipe.dropout), nn.Linear(16, 4))
        self.averaged = self.modules

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(trained(self.modules), self.recipe.optim)

    def learning_rate(self, step: int) -> float:
        return scheduled(self.recipe.optim.learning_rate, step, self.recipe.steps, self.recipe.optim)

    def batches(self, first: int) -> Iterator[list[ToyBatch]]:
        for step in range(first, self.recipe.steps):
            generator = torch.Generator().manual_seed(1000 * self.recipe.seed + step)
            x = torch.randn(self.recipe.rows, 8, generator=generator)
            labels = torch.randint(4, (self.recipe.rows,), generator=generator)
            if self.recipe.poison is not None and self.recipe.poison[0] == step:
                x[self.recipe.poison[1], 3] = float("nan")
            mine = list(range(self.group.rank, self.recipe.rows, self.group.size))
            pieces = [mine[i : i + self.recipe.rows_at_once] for i in range(0, len(mine), self.recipe.rows_at_once)]
            yield [ToyBatch(x[piece], labels[piece], [f"row {i}" for i in piece]) for piece in pieces]

    def totals(self, micro: Sequence[ToyBatch]) -> Tensor:
        return torch.tensor([sum(len(m.labels) for m in micro)], dtype=torch.float64)

    def loss(self, micro: ToyBatch, totals: Sequence[float], step: int) -> tuple[Tensor | None, Tensor]:
        narrow = self.recipe.dtype != "float32"
        with torch.autocast("cpu", dtype=getattr(torch, self.recipe.dtype), enabled=narrow):
            logits = self.modules(micro.x)
        summed = F.cross_entropy(logits.float(), micro.labels, reduction="sum") * self.recipe.loss_scale
        return summed / totals[0], sums(summed)

    def measures(self, sums: Sequence[float], totals: Sequence[float], step: int) -> dict[str, float]:
        return {"loss": sums[0] / totals[0]}

    def work(self, micro: Sequence[ToyBatch], step: int) -> dict[str, float]:
        return {"rows": sum(len(m.labels) for m in micro)}

    def rows(self, micro: ToyBatch) -> list[str]:
        return micro.names

    def evaluates(self, step: int) -> bool:
        return self.recipe.evaluate_every > 0 and (step + 1) % self.recipe.evaluate_every == 0

    def evaluate(self, step: int) -> dict[str, float]:
        return {"eval_loss": self.recipe.scores[(step + 1) // self.recipe.evaluate_every - 1]}

    def export(self, folder: Path, weights: Mapping[str, Tensor] | None) -> Path:
        torch.save(dict(weights or trained(self.modules)), folder / "result.pt")
        return folder


def run_toy(recipe: ToyRecipe) -> None:
    """In a process that may be killed."""
    from llama_multimodal.train import loop

    loop.train(recipe, lambda progress: None)
