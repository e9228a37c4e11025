"""`llama-mm convert`: Hugging Face's layout from Meta's, and the reverse."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from . import common


class Layout(StrEnum):
    """How a checkpoint's files are named and cut."""

    HF = "hf"
    META = "meta"


def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A folder with a checkpoint in either layout.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A new folder.")],
    layout: Annotated[Layout, typer.Option(help="The layout to write.")],
) -> None:
    """Write a checkpoint in another layout, bit by bit the same weights."""
    from ..weights.convert import convert as run

    with common.progress_bar("converting", bytes_=True) as progress:
        run(source, target, layout=layout.value, progress=progress)
    print(f"{target}    ({layout.value} layout)")
