"""When a step goes wrong: which module and which rows made the loss infinite, and what did not fit in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import local_part
from ..errors import TrainingError
from . import checkpoint
from .config import Recipe
from .parallel import Group
from .task import Task, trained

_SHOWN = 3  # rows that a message names


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers of a step (dropout) that depend on nothing before it."""
    torch.manual_seed((seed * 1_000_003 + step) * 4099 + rank)


@contextlib.contextmanager
def fits(task: Task[Any], micro: Any, step: int) -> Iterator[None]:
    """Raises:
    TrainingError: the memory is too small for this micro-batch.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        rows = task.rows(micro)
        raise TrainingError(
            f"step {step + 1} does not fit in the memory of {task.device}: a micro-batch of {len(rows)} rows"
            f" ({_named(rows)}); {task.relief}"
        ) from error


def explain_loss(
    recipe: Recipe, task: Task[Any], micro: Sequence[Any], totals: Sequence[float], step: int, group: Group
) -> str:
    """Run the step again and find where its loss stopped being finite; the same words in every process."""
    found = None
    for batch in micro:  # all of them, as the others do
        harm = _first(recipe, task, batch, totals, step, group)
        found = found or harm
    where = next((words for words in group.gather(found) if words is not None), "nothing that can be found again")
    return f"step {step + 1}: the loss is not finite; the first was {where}; {_way_out(recipe)}"


def explain_gradient(recipe: Recipe, task: Task[Any], step: int, group: Group) -> str:
    """Which weight's gradient is not finite, where the loss was; its parts may lie in other processes."""
    names = [name for name, p in trained(task.modules).items() if p.grad is not None and not _finite(p.grad)]
    first = next((found[0] for found in group.gather(names, of_all=True) if found), "a weight")
    return f"step {step + 1}: the gradient of {first} is not finite; {_way_out(recipe)}"


def _way_out(recipe: Recipe) -> str:
    steps = checkpoint.saved_steps(recipe.checkpoints)
    kept = f"the last good step is {steps[max(steps)]}" if steps else "no step was saved yet"
    return f"{kept}; look at those rows, or lower the learning rate"


def _first(recipe: Recipe, task: Task[Any], micro: Any, totals: Sequence[float], step: int, group: Group) -> str | None:
    """The first module whose output is not finite, and the rows in it; None if this micro-batch does no harm."""
    names = {module: name for name, module in task.modules.named_modules()}
    found: list[tuple[str, Tensor]] = []

    def look(module: nn.Module, given: Any, output: Any) -> None:
        tensors = [value for value in (output if isinstance(output, tuple) else (output,)) if isinstance(value, Tensor)]
        found.extend((names[module], value) for value in tensors[:1] if not found and not _finite(value))

    hooks = [module.register_forward_hook(look) for module in names]
    try:
        seed_step(recipe.seed, step, group.rank)
        with torch.no_grad():
            _, sums = task.loss(micro, totals, step)
    finally:
        for hook in hooks:
            hook.remove()
    rows = task.rows(micro)
    if not found:
        return None if _finite(sums) else f"the loss itself, in the rows {_named(rows)}"
    name, output = found[0]
    broken = [n for n, p in task.modules.get_submodule(name).named_parameters(recurse=False) if not _finite(p)]
    weights = f", whose {broken[0]} is not finite" if broken else ""
    if output.ndim > 1 and len(output) == len(rows):  # one entry a row of the batch
        rows = [row for row, values in zip(rows, output, strict=True) if not _finite(values)]
    return f"the output of {name or 'the model'}{weights}, in the rows {_named(rows)}"


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(local_part(values)).all())


def _named(rows: Sequence[str]) -> str:
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return (", ".join(rows[:_SHOWN]) or "of unknown origin") + more
