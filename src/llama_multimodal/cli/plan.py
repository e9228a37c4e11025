"""`llama-mm plan`: how much memory a model takes, and which GPUs that fits."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..errors import CheckpointError, ConfigError
from ..zoo.registry import EMBEDDED_FOLDER, EMBEDDED_MEND, EMBEDDED_MISSING, find, nearest_name
from . import common
from .zoo import size

if TYPE_CHECKING:
    from ..config import AnyModelConfig
    from ..planning import MemoryPlan, Packed, PlanOptions

_GIB = 2**30


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A name that llama-mm zoo lists, a preset (1B, 3B, 11B, 90B), tiny, a folder, a GGUF file, or"
            " a repository that lies in the hub's cache.",
        ),
    ],
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    context: Annotated[
        int | None, typer.Option(help="Tokens of a sequence, prompt and answer. Without: 8192, or all there are.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time; in training, of one micro-batch of one GPU.")] = 1,
    prompt: Annotated[
        int | None, typer.Option(help="Tokens of a sequence that are read in one go. Without: all of the context.")
    ] = None,
    images: Annotated[int | None, typer.Option(help="Pictures of a sequence. Without: 1.")] = None,
    tiles: Annotated[
        int | None, typer.Option(help="Tiles of a picture. Without: as many as the model cuts at most.")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(help="A picture's width x height, such as 1024x768, in the place of --tiles.")
    ] = None,
    pack: Annotated[
        str | None,
        typer.Option(help="bf16, int8 or int4: the decoder's weights, packed; nf4, with --train lora. Without: as the"
        " checkpoint has them."),
    ] = None,
    train: Annotated[str | None, typer.Option(help="lora or full: plan for training.")] = None,
    rank: Annotated[int, typer.Option(help="Of LoRA's adapters.")] = 16,
    targets: Annotated[
        list[str] | None,
        typer.Option(help="What LoRA's adapters lie beside: self, cross, mlp, projector, vision. May be repeated."
        " Without: self and mlp."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Blocks keep their input only, and run again.")
    ] = False,
    optimizer: Annotated[str, typer.Option(help="adamw or adamw8bit.")] = "adamw",
    freeze: Annotated[
        list[str] | None,
        typer.Option(help="With --train full, a part that is not trained: vision, projector, self, cross, embedding or"
        " lm_head. May be repeated."),
    ] = None,
    accumulate: Annotated[
        bool, typer.Option("--accumulate", help="A step has several micro-batches, whose gradients add up.")
    ] = False,
    gpus: Annotated[
        int,
        typer.Option(help="Answering divides heads and widths among them (tensor parallelism), training divides all"
        " weights, gradients and moments (FSDP)."),
    ] = 1,
    device: Annotated[str, typer.Option(help="cuda or cpu, which differ in temporaries.")] = "cuda",
    as_json: common.AsJson = False,
) -> None:  # fmt: skip
    """Say how much memory a model takes, part by part, and which GPUs that fits.

    Nothing is downloaded and no weight is read.
    """
    from ..planning import Packed, PlanOptions
    from ..planning import plan as memory_plan

    config, stored = _find(model)
    packed = Packed.recommended(cast(Any, pack), config.text) if pack is not None else stored
    options = PlanOptions(
        dtype=cast(Any, dtype), context=context, batch=batch, prompt=prompt, images=images, tiles=tiles,
        pack=packed, train=cast(Any, train), rank=rank,
        targets=tuple(targets or ("self", "mlp")),
        gradient_checkpointing=gradient_checkpointing, optimizer=cast(Any, optimizer), freeze=tuple(freeze or ()),
        accumulate=accumulate, gpus=gpus, device=cast(Any, device),
    )  # fmt: skip
    if image_size is not None:
        options = _with_picture(config, options, image_size)
    made = memory_plan(config, options)
    if as_json:
        print(json.dumps(_as_dict(model, made), indent=2))
    else:
        _show(model, made)


# --- the model -------------------------------------------------------------------------------------------------------


def _find(model: str) -> tuple[AnyModelConfig, Packed | None]:
    """A model's configuration, and how its decoder is packed in the files.

    Raises:
        CheckpointError: it is neither known nor here. ConfigError: its configuration is damaged or not implemented.
    """
    from ..zoo.configs import find_config

    if (known := find_config(model)) is not None:
        return known, None
    folder = _folder(model)
    if folder.is_dir() and (folder / "config.json").is_file():
        return _read(folder)
    from ..weights.checkpoint import open_checkpoint  # Meta's files and GGUF's, which torch reads

    return open_checkpoint(folder).config, None


def _folder(model: str) -> Path:
    if model == "tiny":
        if not EMBEDDED_FOLDER.is_dir():
            raise CheckpointError(f"{EMBEDDED_MISSING}; {EMBEDDED_MEND}")
        return EMBEDDED_FOLDER
    path = common.expand(model)
    if model.strip() and path.exists():
        return path
    if re.fullmatch(r"\w[\w.-]{0,95}/[\w.-]{1,96}", model):
        from huggingface_hub import try_to_load_from_cache

        if isinstance(cached := try_to_load_from_cache(model, "config.json"), str):
            return Path(cached).parent
    near = nearest_name(model)
    hint = f'; did you mean "{near}"?' if near else "; llama-mm zoo lists what is known"
    raise CheckpointError(f"{model[:200]!r} is neither known, nor a folder or a file, nor in the hub's cache{hint}")


def _read(folder: Path) -> tuple[AnyModelConfig, Packed | None]:
    from ..config import config_from_hf

    raw = _table(folder / "config.json")
    quantized = raw.pop("quantization_config", None)
    generation = folder / "generation_config.json"
    config = config_from_hf(raw, _table(generation) if generation.is_file() else None)
    return config, None if quantized is None else _packed(quantized)


def _table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} holds no table")
    return table


def _packed(quantized: Any) -> Packed:
    """How `weights.packed` and `weights.nf4` write it down: a group of layers, and perhaps one of the LM head alone.

    Raises:
        ConfigError: another kind of quantization.
    """
    from ..planning import Packed

    formats = {8: "int8", 4: "int4"}
    try:
        if quantized.get("bnb_4bit_quant_type") == "nf4":
            return Packed("nf4")
        groups = list(quantized["config_groups"].values())
        heads = [any("lm_head" in target for target in group["targets"]) for group in groups]
        layers = next((group for group, head in zip(groups, heads) if not head or len(group["targets"]) > 1), groups[0])
        weights = layers["weights"]
        head = next((group["weights"]["num_bits"] for group, is_head in zip(groups, heads) if is_head), 16)
        return Packed(
            cast(Any, formats[weights["num_bits"]]), weights["group_size"] or 32, weights["symmetric"],
            cast(Any, formats.get(head, "bf16")),
            any("cross_attn" in name for name in quantized.get("ignore", ())),
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError("config.json: quantization_config is of a kind that is not read; give --pack") from error


def _with_picture(config: AnyModelConfig, options: PlanOptions, picture: str) -> PlanOptions:
    """The options with the tiles that a picture of this size becomes.

    Raises:
        ConfigError: no size, or tiles besides.
    """
    from PIL import Image

    from ..config import LanguageModelConfig, TiledVisionConfig
    from ..processing import anyres, splitting, tiles

    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", picture.strip().lower())
    if match is None:
        raise ConfigError(f'--image-size is width x height, such as 1024x768, not "{picture}"')
    if options.tiles is not None:
        raise ConfigError("--tiles and --image-size say the same thing; give one of them")
    if isinstance(config, LanguageModelConfig):
        raise ConfigError("the model reads text only; leave --image-size out")
    width, height = int(match[1]), int(match[2])
    if isinstance(config.vision, TiledVisionConfig):
        rows, columns = tiles.choose_canvas(width, height, config.vision.image_size, config.vision.max_num_tiles)
        return replace(options, tiles=rows * columns)
    preprocess = config.preprocess()
    if preprocess.layout == "anyres":
        canvas = anyres.choose_canvas(width, height, preprocess.grid_pinpoints)
        return replace(options, tiles=1 + canvas[0] * canvas[1] // (preprocess.tile_size or 1) ** 2)
    if preprocess.layout == "split":
        rows, columns = splitting.grid_of(Image.new("RGB", (width, height)), preprocess)
        return replace(options, tiles=1 + rows * columns)
    return options  # it is brought to the one size that the encoder takes


# --- what is shown ---------------------------------------------------------------------------------------------------


def _as_dict(model: str, made: MemoryPlan) -> dict[str, Any]:
    from ..planning import GPUS

    return {
        "model": model,
        "parameters": made.parameters,
        "trained_parameters": made.trained_parameters,
        "options": asdict(made.options),
        "context": made.load.context,
        "prompt": made.load.prompt,
        "images": made.load.images,
        "tiles": made.load.tiles,
        "parts": [asdict(part) for part in made.parts],
        "peak": made.peak,
        "total": made.total,
        "gpus": [
            {"name": gpu.name, "usable": gpu.usable, "fits": gpu.fits(made.total)} for gpu in GPUS
        ],
    }  # fmt: skip


def _show(model: str, made: MemoryPlan) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..planning import GPUS

    console = Console()
    options = made.options

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    say(f"{model}: {_what_runs(made)}")
    if options.gpus > 1:
        say(f"each of {options.gpus} GPUs, {_DIVIDED['training' if options.train else 'answering']}")
    say("")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("part", no_wrap=True)
    for title in ("at most", "at the peak"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("what")
    for part in made.parts:
        table.add_row(part.name, size(part.bytes), size(part.at_peak) if part.at_peak else "-", part.what)
    table.add_row("total", "", size(made.total), f"most is alive in {made.peak}", style="bold")
    console.print(table)
    say("")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, justify in (("GPU", "left"), ("usable", "right"), ("fits", "left"), ("left", "right")):
        table.add_column(title, justify=cast(Any, justify), no_wrap=True)
    for gpu in GPUS:
        left = gpu.usable - made.total
        table.add_row(gpu.name, size(gpu.usable), gpu.fits(made.total), size(left) if left > 0 else "-")
    console.print(table)
    say("")
    say("usable: what CUDA reports, less 0.6 GiB for its context. tight: over 92 % of it, and an allocator may lose")
    say("the rest between its blocks. What lies in the machine's own memory is not counted.")
    if (known := find(model)) is not None and known.gated:
        say("The licence must be accepted on the model's page at huggingface.co before it can be downloaded.")


_DIVIDED = {
    "answering": "with tensor parallelism: the blocks' matrices, the projector and both caches are divided; embedding,"
    " LM head, norms and the rest of the encoder are whole on each",
    "training": "sharded: weights, gradients and moments are divided; activations are each GPU's own, of sequences of"
    " its own",
}


def _what_runs(made: MemoryPlan) -> str:
    """One line: parameters, dtype, sequences, pictures."""
    options, load = made.options, made.load
    words = [f"{made.parameters:,} parameters", options.dtype]
    if options.pack is not None:
        words.append(f"decoder packed as {options.pack.format}")
    words.append(f"{load.rows} × {load.context} tokens")
    if load.images:
        words.append(f"{load.images} pictures of {load.tiles // load.images} tiles")
    if options.train:
        words.append(f"training {made.trained_parameters:,} parameters ({options.train}, {options.optimizer})")
    return ", ".join(words)
