"""`llama-mm train`: run a recipe, keep what it has learnt as a model or an adapter, draw the loss curve."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from . import common

if TYPE_CHECKING:
    from ..train.config import Progress, Recipe

_SHOWN = {
    "loss": "loss {:.3f}", "answer_loss": "loss {:.3f}", "auxiliary_loss": "auxiliary {:.3f}",
    "drift": "drift {:.4f}", "token_accuracy": "tokens right {:.1%}", "samples_per_second": "{:.1f} pictures/s",
    "tokens_per_second": "{:.0f} tokens/s", "images_per_second": "{:.1f} images/s", "mfu": "MFU {:.0%}",
    "memory_gib": "{:.1f} GiB",
}  # fmt: skip
"""What the live line says, as far as a run has it."""
_SMOOTHED = {"loss", "answer_loss", "auxiliary_loss", "drift", "token_accuracy"} | {
    k for k in _SHOWN if k.endswith("_second")
}
_EVALUATED = {
    "eval_loss": "loss {:.3f}", "eval_exact_match": "exact {:.1%}", "eval_anls": "ANLS {:.3f}",
}  # fmt: skip


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file, such as recipes/tiny-lora.yaml.")],
    export_only: Annotated[
        bool, typer.Option("--export-only", help="Do not train; keep what the last saved step has learnt.")
    ] = False,
) -> None:
    """Train by a recipe. Stopped at any time, the same command goes on from the last saved step.

    The run's folder then holds model/ (for --model) or adapter/, loss.png and metrics.jsonl. On several GPUs:
    torchrun --nproc-per-node 8 -m llama_multimodal train RECIPE; the recipe's section parallel says what they share.
    """
    if common.free_threads() and _is_first():  # a run's processes, and the workers that prepare its batches
        common.say("threads of a run are not bound to cores as OMP_PROC_BIND asks: its processes would share one")
    from ..train.recipes import read_recipe

    with _said_once():
        run = read_recipe(recipe)
        from ..train import plots  # matplotlib is missed before the run, not after it

        plots.require_matplotlib()
        if not export_only:
            run.sharing.mesh(int(os.environ.get("WORLD_SIZE", run.processes)))
    if not export_only:
        _run(run, f"llama-mm train {recipe}")
    if _is_first():
        _export(run)


@contextlib.contextmanager
def _said_once() -> Iterator[None]:
    """A mistake that all processes find alike is said by the first."""
    try:
        yield
    except UserError:
        if _is_first():
            raise
        raise SystemExit(2) from None


def _is_first() -> bool:
    """Whether this process is alone, or the first of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


def _run(recipe: Recipe, command: str) -> None:
    """Train with a live line on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from ..train import loop

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )  # fmt: skip
    averages: dict[str, float] = {}

    with Bar(*columns, console=console, disable=not console.is_terminal or not _is_first()) as bar:
        task = bar.add_task("training", total=recipe.steps, state="")

        def report(progress: Progress) -> None:
            state = "  ".join(_line(progress.values, averages, max(0.02, min(1.0, 10 / recipe.steps))))
            bar.update(task, completed=progress.step, state=state)
            if not console.is_terminal and progress.step % recipe.save_every == 0:
                common.say(f"step {progress.step} of {recipe.steps}  {state}")
            if evaluated := [text.format(progress.values[k]) for k, text in _EVALUATED.items() if k in progress.values]:
                console.print(f"held out, step {progress.step}: {'  '.join(evaluated)}", highlight=False)

        for note in recipe.notes() if _is_first() else ():
            common.say(note)
        try:
            loop.train(recipe, report)
        except KeyboardInterrupt:
            bar.stop()
            common.say(f"stopped; to go on from the last saved step: {command}")
            raise


def _line(values: Mapping[str, float], averages: dict[str, float], share: float) -> list[str]:
    """What a step did, in words, but for losses not learnt yet; what is noisy goes into its average by `share`."""
    parts = []
    for name, text in _SHOWN.items():
        value = values.get(name)
        if value is None or (name in ("answer_loss", "token_accuracy") and not values.get("answer_loss")):
            continue
        if name in _SMOOTHED:
            value = averages[name] = averages.get(name, value) + share * (value - averages.get(name, value))
        parts.append(text.format(value))
    return parts


def _export(recipe: Recipe) -> None:
    from ..train import loop, plots

    result = loop.export(recipe)
    curve = plots.plot_run(Path(recipe.output))
    print(f"{result.name:<11} {result}    ({recipe.usage(result)})")
    print(f"loss curve  {curve}")
