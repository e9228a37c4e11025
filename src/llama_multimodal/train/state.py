"""What a run remembers, and its saved steps: written whole or in parts as its model is held, read into either.

A model that every process has whole is saved whole, by the first (`checkpoint`); one that is cut is saved in parts, by
all (`shards`). Both say everything by the parameters' names, so a run goes on with any number of processes and with the
model cut another way, or no more, or for the first time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import fill_parameter, is_saved_run, read_extra
from ..errors import CheckpointError
from . import checkpoint, shards
from .checkpoint import Saved
from .config import Recipe
from .optim import fill_optimizers, state_by_name
from .parallel import Group
from .task import Task, trained


@dataclass
class RunState:
    """A run's task, and what it remembers besides the weights."""

    recipe: Recipe
    task: Task[Any]
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    average: dict[str, Tensor] | None
    parameters: list[nn.Parameter]
    best: dict[str, Any] | None = None  # step and loss of the best evaluation

    @classmethod
    def of(cls, recipe: Recipe, task: Task[Any]) -> RunState:
        average = None
        if recipe.optim.ema_decay is not None:
            average = {name: value.detach().clone() for name, value in trained(task.averaged).items()}
        scaler = torch.amp.GradScaler(task.device.type, enabled=recipe.dtype == "float16")
        return cls(recipe, task, task.optimizers(), scaler, average, list(trained(task.modules).values()))

    def resume(self) -> int:
        """Put the last saved step into the task and in here; returns its number, 0 where there is none. All processes
        call this together.

        Raises:
            CheckpointError: it is damaged, or the run was begun by another recipe.
        """
        path = checkpoint.last_path(self.recipe.checkpoints)
        if path is None:
            return 0
        kept = _read(path, self.task)
        if kept["optimizer"] != (ours := self.recipe.optim.optimizer):
            raise CheckpointError(
                f"{path} was begun by another recipe: with the optimizer {kept['optimizer']}, and this one has {ours};"
                " take another output or that recipe"
            )
        settings = [dict(group) for optimizer in self.optimizers for group in optimizer.param_groups]
        _fill(path, self.task, self.optimizers, self.average if kept["average"] else None)
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        for group, chosen in zip(groups, settings, strict=True):  # the recipe's, whatever was saved with the moments
            group.update(chosen)
        if kept["scaler"]:  # the loss was scaled before, too
            self.scaler.load_state_dict(kept["scaler"])
        self.best = kept["best"]
        return int(kept["step"])

    def save(self, step: int, group: Group) -> None:
        """Keep a step, and of the earlier ones those that the recipe keeps. All processes call this together."""
        folder = self.recipe.checkpoints
        state = {"best": self.best, "scaler": self.scaler.state_dict(), "optimizer": self.recipe.optim.optimizer}
        if self.recipe.sharing.cuts:
            shards.save(folder, step, self.task.modules, self.optimizers, self.average, state)
        elif group.leads:
            learnt = trained(self.task.modules)
            state["optimizers"] = state_by_name(self.optimizers, learnt)
            weights = {name: value.detach() for name, value in learnt.items()}
            checkpoint.save(folder, Saved(step, weights, self.average, state))
        if group.leads:
            best = self.best["step"] if self.best and self.recipe.keep_best else None
            checkpoint.prune(folder, self.recipe.keep_last, best)


def load_result(path: Path, task: Task[Any]) -> Mapping[str, Tensor] | None:
    """Fill what learns of a task that one process has whole; returns the averaged weights, where there are any.

    Raises:
        CheckpointError: as `RunState.resume`.
    """
    average = None
    if _read(path, task)["average"]:
        average = {name: torch.empty_like(value) for name, value in trained(task.averaged).items()}
    _fill(path, task, (), average)
    return average


def best_step(path: Path) -> int:
    """The step that had evaluated best when this one was saved; 0 if none had."""
    return int((_read(path)["best"] or {}).get("step", 0))


def _read(path: Path, task: Task[Any] | None = None) -> dict[str, Any]:
    """What a saved step has besides tensors: `step`, `best`, `scaler`, `optimizer`, whether there is an `average`, and
    `shapes` of what learns.

    task: what it has to fit

    Raises:
        CheckpointError: it is damaged, or the run was begun by another recipe.
    """
    if is_saved_run(path):
        kept = read_extra(path)
    else:
        saved = checkpoint.load(path)
        shapes = {name: value.shape for name, value in saved.weights.items()}
        kept = {**saved.state, "step": saved.step, "shapes": shapes, "average": saved.average is not None}
    if missing := {"step", "best", "scaler", "optimizer", "shapes", "average"} - kept.keys():
        raise CheckpointError(f"{path} does not say its {min(missing)}; move it away to go on without it")
    if task is not None:
        ours = {name: value.shape for name, value in trained(task.modules).items()}
        checkpoint.check_shapes(path, ours, kept["shapes"])
    return kept


def _fill(
    path: Path, task: Task[Any], optimizers: Sequence[torch.optim.Optimizer], average: Mapping[str, Tensor] | None
) -> None:
    """Give everything the values of a saved step; of what is cut, this process's part of them."""
    if is_saved_run(path):
        shards.load(path, task.modules, optimizers, average)
        return
    saved, ours = checkpoint.load(path), trained(task.modules)
    for name, parameter in ours.items():
        fill_parameter(parameter, saved.weights[name])
    fill_optimizers(optimizers, ours, saved.state["optimizers"])
    for name, value in (average or {}).items():
        fill_parameter(value, (saved.average or {})[name])
