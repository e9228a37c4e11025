"""`llama-mm data check`: rows of a data set as the model will see them, and what can be used of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CheckpointError
from . import common

if TYPE_CHECKING:
    from ..processing import Processor
    from ..train.chat.check import Report
    from ..train.chat.config import ChatData
    from ..train.chat.encode import Example

app = typer.Typer(name="data", help="Look at the data of a fine-tuning run.", no_args_is_help=True)


@app.callback()
def _data() -> None:
    """Look at the data of a fine-tuning run."""


@app.command("check")
def check(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_FILE",
            help="A recipe (.yaml), a .jsonl, .json, .csv, .tar or .parquet file, or a folder of captioned pictures.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Whose tokens and tiles to show. The recipe's model, else tiny."),
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows to show.")] = 4,
    limit: Annotated[int, typer.Option(min=0, help="Rows to count, spread over all; 0 counts every one.")] = 500,
    output: Annotated[Path | None, typer.Option(help="Draw the rows that are shown into this PNG.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Most tokens of a row. The recipe's, else any.")] = None,
) -> None:
    """Show rows as the model will see them, with what it learns in colour, and count what can be used.

    Where the output is no terminal, what is learnt stands between ⟦ and ⟧.
    """
    common.bind_threads()
    data, named = _read(source, max_length)
    name = model or named or "tiny"
    from .. import loading
    from ..train.chat.check import check as look
    from ..train.chat.steps import ChatSteps

    _, processor = loading.load(name, device="meta")
    if processor.tokenizer is None:
        raise CheckpointError(f"{name} has no tokenizer, and conversations need one; take another with --model")
    steps = ChatSteps(data, processor, 1)
    with common.progress_bar("reading") as progress:
        report = look(steps, rows, limit, progress)
    if output is not None:
        from ..train.chat.picture import draw

        draw(report.shown, processor).save(output)
    _print(report, processor, name, data, steps.rows_per_epoch)
    if output is not None:
        print(f"drawn  {output}")


def _read(source: str, max_length: int | None) -> tuple[ChatData, str | None]:
    """The data, and the model that a recipe names."""
    from dataclasses import replace

    from ..train.chat.config import ChatData, read_data, source_at

    if Path(source).suffix.lower() in (".yaml", ".yml"):
        data, model = read_data(source)
    else:
        data, model = ChatData(sources=(source_at(source),)), None
    return (data if max_length is None else replace(data, max_length=max_length)), model


def _print(report: Report, processor: Processor, model: str, data: ChatData, size: int | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for example in report.shown:
        _print_example(example, processor, console)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    of = "" if size in (None, report.read) else f" of {size:,}"
    table.add_row("rows read", f"{report.read:,}{of}")
    table.add_row("usable", f"{report.usable:,} ({report.usable / report.read:.1%})")
    kinds: dict[str, list[str]] = {}
    for skip in report.skipped:
        kinds.setdefault(skip.kind, []).append(f"{skip.where}: {skip.reason}")
    for kind, reasons in sorted(kinds.items(), key=lambda item: -len(item[1])):
        table.add_row(f"skipped, {kind}", f"{len(reasons):,}, such as {common.printable(reasons[0])}")
    if report.cut:
        table.add_row("cut short", f"{report.cut:,}")
    table.add_row("shapes", ", ".join(f"{name} ({count:,})" for name, count in report.shapes.most_common()))
    lengths = ", ".join(f"{report.quantile(share)} ({share:.0%})" for share in (0.5, 0.9, 0.99, 1.0))
    table.add_row("tokens of a row", f"{lengths}, with {model}")
    table.add_row("learnt tokens", f"{report.learnt:,} of {report.total:,} ({report.learnt / report.total:.1%})")
    if report.distilled:
        table.add_row("distilled tokens", f"{report.distilled:,}, where the base's predictions are to stay")
    table.add_row("tiles", f"{report.tiles:,} ({report.tiles / report.usable:.1f} a row)")
    console.print(table)
    if len(report.skipped) > data.max_skipped * report.read:
        share = f"{len(report.skipped) / report.read:.1%} of the rows cannot be used"
        console.print(f"{share}; a run stops above {data.max_skipped:.1%} (max_skipped)", style="bold red")


def _print_example(example: Example, processor: Processor, console: object) -> None:
    from rich.console import Console
    from rich.text import Text

    from ..train.chat.check import pieces
    from ..train.chat.picture import describe

    assert isinstance(console, Console)
    text = Text()
    for piece, learnt in pieces(example, processor):
        piece = common.printable(piece)
        marked = f"⟦{piece}⟧" if learnt and not console.is_terminal else piece
        text.append(marked, style="bold green" if learnt else "dim")
    console.print(Text(common.printable(example.where), style="bold"), soft_wrap=True)
    console.print(Text(describe(example), style="dim"), soft_wrap=True)
    console.print(text)
    console.print()
