"""`quantize`: from a checkpoint to a smaller one that loads like any other."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import loading
from .calibration import calibration_rows
from .config import AnyModelConfig, nearest
from .errors import CheckpointError, ConfigError
from .models import LanguageModel
from .ops import Format
from .processing import Processor
from .quant.calibrate import pack_calibrated
from .quant.nf4 import Nf4Config, quantize_nf4
from .quant.pack import LM_HEAD, Packing, bytes_of, layers_to_pack, plain_weight, recommended, use_fp8_activations
from .weights.checkpoint import Checkpoint, build_on_meta, find_layout, open_checkpoint
from .weights.save import save_checkpoint

METHODS = ("rtn", "gptq")
_WEIGHTS = {"hf": "model*.safetensors", "meta": "consolidated*.pth", "gguf": "*.gguf"}
_WHOLE, _READING = 100, 10  # steps of the bar, and those for reading where calibration follows


@dataclass(frozen=True)
class Quantized:
    """What `quantize` wrote.

    bytes_before, bytes_after: of the files that hold weights. rows: calibrated on. skipped: why others were not.
    tied: the LM head is the embedding's table, which stays as it is.
    """

    folder: Path
    bytes_before: int
    bytes_after: int
    rows: int
    skipped: tuple[str, ...]
    tied: bool


def quantize(
    source: str | Path,
    target: str | Path,
    format: Format,
    *,
    group: int = 32,
    symmetric: bool = True,
    lm_head: Format | None = None,
    keep: Iterable[str] | None = None,
    fp8_activations: bool = False,
    method: str = "rtn",
    calibration: str | Path | None = None,
    rows: int = 256,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Quantized:
    """Write a checkpoint with packed weights into the folder `target`; all of it or nothing.

    source: as `load` takes it. format: "int8", "int4" or "fp8"
    group, symmetric, lm_head, keep: see `quant.pack.Packing`; None takes what is `recommended` for the format. An LM
        head that is the embedding's table stays so, as files hold the embedding, unless lm_head names a format: then it
        is packed and has a table of its own
    fp8_activations: with fp8, and for whoever loads it: see `quant.pack.use_fp8_activations`
    method: "rtn" rounds to the nearest, each layer as it is read, so that the plain weights are never all in memory;
        "gptq" rounds so that outputs change least on the calibration rows, and begins with all of the plain weights
    calibration: for gptq: a `.jsonl` file, a folder or "world", see `calibration`; `rows` of them at most

    Raises:
        CheckpointError: the source cannot be read or is quantized already; the target cannot be written or is
            something else.
        ConfigError: a packing that does not go with this model, an unknown method, or no calibration rows.
    """
    if method not in METHODS:
        raise ConfigError(f'unknown method "{method}"{nearest(method, METHODS)}; choose {" or ".join(METHODS)}')
    if (method == "gptq") != (calibration is not None):
        raise ConfigError(
            "gptq rounds by what the model reads: give it calibration rows (a .jsonl file, a folder or world)"
            if method == "gptq"
            else "rounding to the nearest takes no calibration rows; leave them out, or choose the method gptq"
        )
    if fp8_activations and format != "fp8":
        raise ConfigError(f"fp8 activations go with fp8 weights, not with {format}; choose fp8, or leave them out")
    checkpoint, target = _open(source), Path(target).expanduser()
    config, spared = checkpoint.config, recommended(format, checkpoint.config.text)
    kept = spared.keep if keep is None else tuple(keep)
    packing = Packing(format, group, symmetric, lm_head or spared.lm_head, kept)
    if format == "bf16":
        raise ConfigError("bf16 is no quantization; choose int8, int4 or fp8")
    tied = config.text.tie_word_embeddings and lm_head in (None, "bf16")
    if tied:
        packing = replace(packing, keep=(*kept, LM_HEAD))
    elif config.text.tie_word_embeddings:
        config = replace(config, text=replace(config.text, tie_word_embeddings=False))
    _check_target(target, checkpoint)
    chosen, needed = _what_becomes(config, checkpoint.dtype, packing)
    if lm_head is not None and LM_HEAD not in chosen and not tied:
        raise ConfigError(f'the LM head is to be kept and to become {lm_head}; leave out one of "keep" and "lm_head"')
    _check_room(target, needed)

    def step(done: int, total: int, first: int, last: int) -> None:
        if progress is not None:
            progress(first + (last - first) * done // max(1, total), _WHOLE)

    found = None
    if calibration is None:
        model, processor = loading.load(
            source, device=device, pack=packing, progress=lambda done, total: step(done, total, 0, _WHOLE)
        )
    else:
        model, processor = loading.load(
            source, device=device, progress=lambda done, total: step(done, total, 0, _READING)
        )
        found = calibration_rows(calibration, processor, rows)
        pack_calibrated(model, packing, found.rows, lambda done, total: step(done, total, _READING, _WHOLE))
    model.config, model.decoder.config = config, config.text
    if fp8_activations:
        use_fp8_activations(model)
    bytes_after = _save(model, processor, checkpoint, target)
    skipped = () if found is None else tuple(found.skipped)
    return Quantized(
        target, _size(_files(checkpoint)), bytes_after, 0 if found is None else len(found.rows), skipped, tied
    )


def quantize_to_nf4(
    source: str | Path,
    target: str | Path,
    config: Nf4Config | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Quantized:
    """Write a checkpoint whose linear layers are NF4, the encoder's too, into the folder `target`; all or nothing.

    It begins with the plain weights in memory. Parameters and errors as of `quantize`; and

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    checkpoint, target = _open(source), Path(target).expanduser()
    _check_target(target, checkpoint)
    model, processor = loading.load(source, device=device, progress=progress)
    quantize_nf4(model, config)
    _check_room(target, sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())))
    bytes_after = _save(model, processor, checkpoint, target)
    return Quantized(target, _size(_files(checkpoint)), bytes_after, 0, (), checkpoint.config.text.tie_word_embeddings)


def _open(source: str | Path) -> Checkpoint:
    place = loading.locate(source)
    checkpoint = open_checkpoint(place)
    if checkpoint.packed:
        raise CheckpointError(f"{place} is quantized already; quantize the checkpoint that it was made from")
    return checkpoint


def _save(model: LanguageModel, processor: Processor, checkpoint: Checkpoint, target: Path) -> int:
    """Bytes of the weights that were written."""
    from_files = checkpoint.layout != "gguf"
    save_checkpoint(
        model, target,
        tokenizer_from=checkpoint.folder if from_files else None, beside=None if from_files else processor.save,
    )  # fmt: skip
    return _size(target.glob(_WEIGHTS["hf"]))


def _check_target(target: Path, checkpoint: Checkpoint) -> None:
    if target.exists() and target.resolve() in (checkpoint.folder.resolve(), checkpoint.folder.resolve().parent):
        raise CheckpointError(f"{target} holds the source itself; choose another folder for the result")
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and find_layout(target) is None):
        raise CheckpointError(f"{target} is there and holds no checkpoint; choose a new folder")


def _what_becomes(config: AnyModelConfig, dtype: torch.dtype, packing: Packing) -> tuple[list[str], int]:
    """The layers that are packed, and bytes of the result, about; whether the packing goes with the model is seen
    before hours are spent on it."""
    model = build_on_meta(config)
    total = dtype.itemsize * sum(value.numel() for value in model.parameters())
    chosen = layers_to_pack(model, packing)
    for path in chosen:
        rows, columns = plain_weight(model, path).shape
        total -= rows * columns * dtype.itemsize - bytes_of(rows, columns, packing, path)
    return chosen, total


def _check_room(target: Path, needed: int) -> None:
    there = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise CheckpointError(
            f"the quantized model takes {needed / 1e9:.1f} GB, and the disk of {there} has {free / 1e9:.1f} GB left;"
            " free some space or choose another folder"
        )


def _files(checkpoint: Checkpoint) -> Iterable[Path]:
    place = checkpoint.folder
    return [place] if place.is_file() else place.glob(_WEIGHTS[checkpoint.layout])


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)
