"""`llama-mm quantize`: a smaller model from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ..errors import PromptError
from . import common

if TYPE_CHECKING:
    from ..ops import Format

_NONE = "none"


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="tiny, a folder, a .gguf file or a repository.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="A new folder, or one with a checkpoint to replace.")],
    int8: Annotated[bool, typer.Option("--int8", help="Whole numbers of 8 bits.")] = False,
    int4: Annotated[bool, typer.Option("--int4", help="Whole numbers of 4 bits.")] = False,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="Numbers of 8 bits with an exponent (e4m3), a scale a row.")
    ] = False,
    nf4: Annotated[
        bool,
        typer.Option("--nf4", help="4 bits on a normal distribution's quantiles, the encoder too (bitsandbytes)."),
    ] = False,
    fp8_activations: Annotated[
        bool,
        typer.Option(
            "--fp8-activations", help="With --fp8: round what goes into these layers too, token by token (W8A8)."
        ),
    ] = False,
    group: Annotated[
        int | None, typer.Option(min=1, help="Weights that share a scale, 32 if left out; 128 makes files smaller.")
    ] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Whether zero is the middle of a group's range.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="rtn rounds to the nearest; gptq rounds by what the model reads in calibration.")
    ] = "rtn",
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help='Layers that stay as they are, as "lm_head" or "layers.0.*"; may be repeated. Left out, int4 keeps'
            f" cross_attention.* where there is one; {_NONE} keeps no layer.",
        ),
    ] = None,
    lm_head: Annotated[
        str | None,
        typer.Option(
            help="The LM head's format: int8, int4, fp8 or bf16; left out, int8 with int4, and as it is where it is the"
            " embedding's own table."
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.jsonl|FOLDER",
            help="Texts, conversations or pictures that gptq runs the model on; the word world for the embedded"
            " model's training pictures.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Most calibration rows.")] = 256,
    device: common.Device = "auto",
) -> None:
    """Write a smaller model that loads like any other: llama-mm quantize tiny --int4 OUT"""
    flags: dict[Format, bool] = {"int8": int8, "int4": int4, "fp8": fp8}
    chosen = [format for format, given in flags.items() if given]
    if len(chosen) + nf4 != 1:
        raise PromptError("choose one of --int8, --int4, --fp8 and --nf4")
    if nf4 and (symmetric is not None or method != "rtn" or lm_head or calibration or fp8_activations):
        raise PromptError("--nf4 goes with --group (of 64 unless given), --keep and --device alone; leave the rest out")
    if fp8 and (group is not None or symmetric is not None):
        raise PromptError("--fp8 has a scale a row and no groups; leave --group and --symmetric out")
    common.bind_threads()
    kept = None if keep is None else [glob for glob in keep if glob != _NONE]
    place = common.choose_device(device)
    from ..quant.nf4 import Nf4Config
    from ..quantize import quantize as run
    from ..quantize import quantize_to_nf4

    with common.progress_bar(f"quantizing to {'nf4' if nf4 else chosen[0]}") as progress:
        if nf4:
            settings = Nf4Config(block_size=64 if group is None else group)
            if kept is not None:
                settings = replace(settings, keep=tuple(kept))
            done = quantize_to_nf4(model, common.expand(target), settings, device=place, progress=progress)
        else:
            done = run(
                model, common.expand(target), chosen[0], group=32 if group is None else group,
                symmetric=symmetric is not False, lm_head=cast("Format | None", lm_head), keep=kept,
                fp8_activations=fp8_activations, method=method, calibration=calibration, rows=rows, device=place,
                progress=progress,
            )  # fmt: skip
    if done.tied and not nf4:
        common.say(
            "the LM head is the embedding's own table and stays as it is; --lm-head int8 packs one of its own: larger"
            " files, faster answers"
        )
    if done.skipped:
        common.say(f"{len(done.skipped)} calibration rows could not be used, the first: {done.skipped[0]}")
    before, after = done.bytes_before, done.bytes_after
    print(f"{before / 1e6:,.1f} MB → {after / 1e6:,.1f} MB ({100 * after / before:.0f} %)")
    print(f"{done.folder}    ({'nf4' if nf4 else f'{method}, {chosen[0]}'})")
