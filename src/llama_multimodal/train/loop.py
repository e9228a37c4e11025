"""The training loop: batches, forward, backward, step; one loop for every task, resumable at every saved step.

A step is a function of the recipe, the step's number and the weights: its data come from the seed and the number, and
so do its random numbers. A run that was killed and started again therefore takes the steps that it would have taken.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import local_part
from ..errors import CheckpointError, TrainingError
from . import checkpoint, guard
from .config import Progress, Recipe, Report
from .launch import launch
from .parallel import Group
from .record import write_record
from .state import RunState, best_step, load_result
from .task import Task, trained
from .watch import Watch, memory_in_use, peak_flops

_LEAST_SCALE = 2.0**-4  # of the loss in float16: below it, no smaller one helps


def train(recipe: Recipe, report: Report) -> Path:
    """Run a recipe to its last step, from its last saved step if there is one; returns the run's folder.

    Raises:
        TrainingError: the loss is not finite, a step teaches nothing or does not fit in memory; what was saved stays.
    """
    launch(_run, recipe, report)
    return Path(recipe.output)


def export(recipe: Recipe) -> Path:
    """Write what a run has learnt so far as a model or an adapter; returns where.

    Raises:
        CheckpointError: the run has no saved step.
    """
    steps = checkpoint.saved_steps(recipe.checkpoints)
    if not steps:
        raise CheckpointError(f"{recipe.output} holds no saved run; train it first")
    last = steps[max(steps)]
    chosen = steps.get(best_step(last), last) if recipe.result == "best" else last
    gc.collect()  # the run's own model, whose blocks may refer to themselves: two may be one too many
    task = recipe.to_export().task(Group())
    average = load_result(chosen, task)
    result = task.export(Path(recipe.output), average)
    write_record(recipe, result)
    return result


def _run(recipe: Recipe, group: Group, report: Report) -> None:
    """The loop of one process; the first logs, reports and saves."""
    torch.manual_seed(recipe.seed)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    with _deterministic(recipe.deterministic):
        task = recipe.task(group)
        task.open_data()
        group.begin(task.modules)
        state = RunState.of(recipe, task)
        first = state.resume()
        if group.leads:
            write_record(recipe, Path(recipe.output))
        with Watch.of(recipe, first, group.leads) as watch:
            _steps(recipe, task, group, state, first, report, watch)


def _steps(
    recipe: Recipe, task: Task[Any], group: Group, state: RunState, first: int, report: Report, watch: Watch
) -> None:
    peak, started = None, time.perf_counter()
    for step, micro in enumerate(task.batches(first), start=first):
        values = _step(recipe, task, micro, step, group, state)
        if state.average is not None and "skipped" not in values:
            _update_average(state.average, task.averaged, min(recipe.optim.ema_decay or 0.0, (step + 1) / (step + 10)))
        seconds = time.perf_counter() - started
        done = task.work(micro, step)
        counts = group.sum(torch.tensor(list(done.values()), dtype=torch.float64)) if done else []
        for name, count in zip(done, counts, strict=True):
            if name != "flops":
                values[f"{name}_per_second"] = count / seconds
                continue
            if peak is None:
                peak = peak_flops(task.device, recipe.dtype) * group.size
            values["mfu"] = count / seconds / peak
        values["memory_gib"] = memory_in_use(task.device) / 2**30
        measured: dict[str, float] = {}
        if task.evaluates(step):
            with _averaged(task.averaged, state.average):
                measured = task.evaluate(step)
        better = bool(measured) and (state.best is None or measured["eval_loss"] < state.best["loss"])
        if better:
            state.best = {"step": step + 1, "loss": measured["eval_loss"]}
        if group.leads:
            progress = Progress(step + 1, {**values, **measured})
            watch.log(progress)
            report(progress)
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps or (better and recipe.keep_best):
            state.save(step + 1, group)
        started = time.perf_counter()


def _step(
    recipe: Recipe, task: Task[Any], micro: Sequence[Any], step: int, group: Group, state: RunState
) -> dict[str, float]:
    """Accumulate the gradients of one step over every process, and take it."""
    totals = group.sum(task.totals(micro))
    try:
        task.check(totals, micro, step)
    except TrainingError as error:
        group.fail(error)
    rate = task.learning_rate(step)
    for settings in (table for optimizer in state.optimizers for table in optimizer.param_groups):
        settings["lr"] = rate * settings.get("share", 1.0)
    guard.seed_step(recipe.seed, step, group.rank)
    summed = torch.zeros(task.num_sums, dtype=torch.float64, device=task.device)
    for i, batch in enumerate(micro):
        group.before_backward(task.modules, last=i == len(micro) - 1)
        with guard.fits(task, batch, step):
            loss, sums = task.loss(batch, totals, step)
            summed += sums
            if loss is not None and loss.requires_grad:  # what reads pictures alone learns nothing from text
                state.scaler.scale(loss).backward()
    group.sum_gradients(state.parameters)
    counted = group.sum(summed)
    if not all(map(math.isfinite, counted)):
        group.fail(TrainingError(guard.explain_loss(recipe, task, micro, totals, step, group)))
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
    task.share_gradients()
    total_norm = group.gradient_norm(state.parameters)
    norm = float(total_norm)
    values = {**task.measures(counted, totals, step), "learning_rate": rate, "gradient_norm": norm}
    if math.isfinite(norm):
        group.clip(state.parameters, recipe.optim.clip_norm, total_norm)
    else:
        if not state.scaler.is_enabled() or state.scaler.get_scale() < _LEAST_SCALE:
            group.fail(TrainingError(guard.explain_gradient(recipe, task, step, group)))
        values |= {"skipped": 1.0, "gradient_norm": 0.0}  # float16's range was left: a smaller scale, and no step
    for optimizer in state.optimizers if "skipped" not in values else ():
        state.scaler.step(optimizer)
    state.scaler.update()
    task.modules.zero_grad(set_to_none=True)
    return values


@torch.no_grad()
def _update_average(average: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    for name, value in trained(module).items():
        local_part(average[name]).lerp_(local_part(value), 1 - decay)


@contextlib.contextmanager
def _averaged(module: nn.Module, average: dict[str, Tensor] | None) -> Iterator[None]:
    """The module with its averaged weights. They change places, one at a time: parts of a cut model are gathered from
    where they lie, and a copy of them all might not fit."""
    _swap(module, average)
    try:
        yield
    finally:
        _swap(module, average)


@torch.no_grad()
def _swap(module: nn.Module, average: dict[str, Tensor] | None) -> None:
    for name, value in trained(module).items() if average is not None else ():
        ours, other = local_part(value), local_part((average or {})[name])
        kept = ours.clone()
        ours.copy_(other)
        other.copy_(kept)


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Only algorithms that sum in the same order every time."""
    if not wanted or torch.are_deterministic_algorithms_enabled():  # to say it again takes torch a second
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS refuses
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
