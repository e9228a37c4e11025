"""`llama-mm train`: run a recipe, keep the averaged weights as a checkpoint, draw the loss curve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import common

if TYPE_CHECKING:
    from ..train.config import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file, such as recipes/tiny.yaml.")],
    export_only: Annotated[
        bool, typer.Option("--export-only", help="Do not train; keep what the last saved step has learnt.")
    ] = False,
) -> None:
    """Train by a recipe. Stopped at any time, the same command goes on from the last saved step.

    The run's folder then holds model/ (for --model), loss.png and metrics.jsonl.
    """
    # No common.bind_threads(): the workers that render pictures would inherit the one core of the thread that starts
    # them, and all share it.
    from ..train.config import read_recipe

    run = read_recipe(recipe)
    from ..train import plots  # matplotlib is missed before the run, not after it

    plots.require_matplotlib()
    if not export_only:
        _run(run, f"llama-mm train {recipe}")
    _export(run)


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

    def smooth(name: str, value: float) -> float:
        averages[name] = value if name not in averages else 0.98 * averages[name] + 0.02 * value
        return averages[name]

    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=recipe.steps, state="")

        def report(progress: loop.Progress) -> None:
            parts = [f"auxiliary {smooth('auxiliary', progress.auxiliary_loss):.3f}"]
            if progress.step > recipe.vision_steps:  # before that only the encoder learns
                accuracy = 100 * smooth("accuracy", progress.token_accuracy)
                parts.insert(0, f"loss {smooth('answer', progress.answer_loss):.3f}  tokens right {accuracy:.1f} %")
            parts.append(f"{smooth('speed', progress.samples_per_second):.1f} pictures/s")
            state = "  ".join(parts)
            bar.update(task, completed=progress.step, state=state)
            if not console.is_terminal and progress.step % recipe.save_every == 0:
                common.say(f"step {progress.step} of {recipe.steps}  {state}")

        if not (Path(recipe.output) / "tokenizer.json").exists():
            common.say("first the tokenizer is built, from the questions that will be asked; it takes about a minute")
        try:
            loop.train(recipe, report)
        except KeyboardInterrupt:
            bar.stop()
            common.say(f"stopped; to go on from the last saved step: {command}")
            raise


def _export(recipe: Recipe) -> None:
    import torch

    from ..train import plots
    from ..train.loop import averaged_model
    from ..weights.save import save_checkpoint

    folder = Path(recipe.output)
    model, _, tokenizer_file = averaged_model(recipe)
    target = folder / "model"
    save_checkpoint(model.to(torch.bfloat16), target, tokenizer_from=tokenizer_file.parent)
    curve = plots.plot_run(folder)
    print(f"model       {target}    (llama-mm describe IMAGE --model {target})")
    print(f"loss curve  {curve}")
