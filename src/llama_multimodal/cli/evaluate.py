"""`llama-mm eval`: held-out questions of the embedded model's world, by kind."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import PromptError
from . import common

if TYPE_CHECKING:
    from ..eval.harness import Report


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="tiny, a folder or a repository.")] = "tiny",
    per_kind: Annotated[int, typer.Option(min=1, help="Questions of each kind.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="The first picture; pictures follow it one by one.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at a time.")] = 16,
    dtype: common.DType = "auto",
    device: common.Device = "auto",
    pack: common.Pack = "auto",
    int8_activations: common.Int8Activations = False,
    adapter: common.Adapter = None,
    as_json: common.AsJson = False,
) -> None:
    """Ask held-out questions of every kind and print the share of exact answers, with 95 % intervals."""
    common.bind_threads()
    from ..eval.harness import evaluate as ask
    from ..models import VisionLanguageModel
    from ..zoo.world.fonts import faces

    faces()  # without the fonts there are no pictures to ask about; say so before the model is loaded
    loaded, processor = common.load_model(model, dtype, device, pack, int8_activations, adapter)
    if not isinstance(loaded, VisionLanguageModel):
        raise PromptError(f"{model} reads text only, and the questions are about pictures; take a vision model")
    with common.progress_bar("answering") as progress:
        report = ask(
            loaded, processor, per_kind=per_kind, first_seed=seed, batch_size=batch_size, progress=progress
        )  # fmt: skip
    if as_json:
        print(
            json.dumps(
                {"model": model, "adapter": adapter, "per_kind": per_kind, "seed": seed, **report.as_dict()}, indent=2
            )
        )
    else:
        _print(report)


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    def table(title: str) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim")
        made.add_column("questions", min_width=16)
        for name in ("right", "of", "%", "95 % interval"):
            made.add_column(name, justify="right")
        return made

    console = Console(highlight=False)
    kinds = table("By kind")
    for kind, score in report.scores.items():
        kinds.add_row(kind, str(score.right), str(score.total), *_per_cent(score.right, score.total, score.interval))
    console.print(kinds)
    console.print()
    pooled = table("Against the targets")
    pooled.add_column("target", justify="right")
    pooled.add_column("")
    for name, (score, target) in report.pooled().items():
        if score.total:
            reached = 100 * score.right >= target * score.total
            pooled.add_row(
                name, str(score.right), str(score.total), *_per_cent(score.right, score.total, score.interval),
                str(target), "reached" if reached else "missed",
            )  # fmt: skip
    console.print(pooled)


def _per_cent(right: int, total: int, interval: tuple[float, float]) -> tuple[str, str]:
    low, high = interval
    return (f"{100 * right / total:.1f}" if total else "-", f"{100 * low:.1f} to {100 * high:.1f}")
