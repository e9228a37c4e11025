"""Saving and loading a run whose model is shared out: every process writes its part, and any number may read it back.

The files are torch.distributed.checkpoint's. They hold pieces of parameters by name and place, so a run that two
processes saved goes on with one or four, cut in any way; and one process can put the model together whole.
Their index is a pickle: read only what comes from a run of your own.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from ..errors import CheckpointError
from ..models import LanguageModel, build_model
from ..weights.io import flush, flush_folder

_EXTRA = "extra.json"
_NAME = re.compile(r"step-(\d{8})")

Result = TypeVar("Result")


def save_run(
    folder: str | Path,
    step: int,
    model: LanguageModel,
    optimizers: Sequence[Optimizer] = (),
    *,
    extra: Mapping[str, Any] | None = None,
    keep: int | None = None,
    trainable_only: bool = False,
    beside: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write model and optimizers to `folder/step-…`, which all processes must reach; returns that folder.

    All call this together, and each writes its part. It is written aside and renamed: `latest_run` never finds half of
    one.

    extra: what else it takes to go on, as JSON
    keep: how many of the folder's runs stay, the latest; None keeps them all
    trainable_only: leave out what is frozen, which the model has without it
    beside: tensors by name, cut as the parameters are or not at all, such as averaged weights

    Raises:
        CheckpointError: the folder cannot be written, or holds that step already.
    """
    place = Path(folder) / f"step-{step:08d}"
    aside = place.with_suffix(".partial")
    _on_first(lambda: _make_room(place, aside))
    try:
        with _alone():
            state = _state(model, optimizers, trainable_only, beside)
            dcp.save(state, checkpoint_id=aside, no_dist=not dist.is_initialized())
    except (OSError, CheckpointException) as error:
        raise CheckpointError(f"{place} cannot be written: {_reason(error)}") from error
    _on_first(lambda: _finish(place, aside, dict(extra or {}), keep))
    return place


def load_run(
    run: str | Path,
    model: LanguageModel,
    optimizers: Sequence[Optimizer] = (),
    *,
    trainable_only: bool = False,
    beside: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Fill a model and its optimizers from one of a folder's runs, however many processes there are now; returns
    `extra`. All call this together.

    optimizers: as they were saved, or none at all, to read the model alone. A parameter that had learnt nothing yet has
        nothing in them, as it had
    trainable_only: as it was saved. beside: what to fill of the tensors that were saved beside the model

    Raises:
        CheckpointError: it is not there, damaged, or of another model.
    """
    run = Path(run)
    extra = read_extra(run)
    state = _state(model, optimizers, trainable_only, beside)
    fresh: dict[str, Any] = {}
    try:
        if optimizers:
            fresh = _take_unsaved(run, state["optimizers"])
        with _alone():
            dcp.load(state, checkpoint_id=run, no_dist=not dist.is_initialized())
    except (OSError, RuntimeError, ValueError, KeyError, CheckpointException) as error:
        raise CheckpointError(f"{run} does not fit this model, or is damaged: {_reason(error)}") from error
    if optimizers:
        set_state_dict(
            model,
            list(optimizers),
            model_state_dict=state["model"],
            optim_state_dict=state["optimizers"] | fresh,
            options=_options(trainable_only),
        )
        unlearnt = {_parameter_of(key) for key in fresh}
        for parameter in (value for name, value in model.named_parameters() if name in unlearnt):
            for optimizer in optimizers:
                optimizer.state.pop(parameter, None)
    else:
        set_model_state_dict(model, state["model"], options=StateDictOptions(strict=not trainable_only))
    return extra


def read_extra(run: str | Path) -> dict[str, Any]:
    """`extra` of a saved run alone.

    Raises:
        CheckpointError: it is not there, or damaged.
    """
    try:
        extra: dict[str, Any] = json.loads((Path(run) / _EXTRA).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run} is no saved run ({error}); give a folder step-…, as latest_run does") from error
    return extra


def is_saved_run(folder: str | Path) -> bool:
    """Whether a folder is what `save_run` writes."""
    return (Path(folder) / _EXTRA).is_file()


def latest_run(folder: str | Path) -> Path | None:
    """The saved run with the most steps, or None."""
    return max(_runs(Path(folder)), default=None)


def full_state(model: LanguageModel, *, trainable_only: bool = False) -> dict[str, Tensor]:
    """The whole parameters by name, on the CPU of the first process; the others get none. All call this together."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trainable_only)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state if _is_first() else {}


def load_full_state(model: LanguageModel, state: Mapping[str, Tensor]) -> None:
    """Fill a model from whole parameters that the first process has; what the others give is not read. All call this
    together. The model may be on the meta device: then only the first process ever holds all of it.

    Raises:
        CheckpointError: names or shapes differ from the model's.
    """
    _on_first(lambda: _check_fits(model, state))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    set_model_state_dict(model, dict(state) if _is_first() else {}, options=options)


def full_model(model: LanguageModel) -> LanguageModel | None:
    """The model whole, on the CPU of the first process, for `save`; None on the others. All call this together.

    Raises:
        CheckpointError: its layers were changed otherwise than by `parallelize` and `shard_model`.
    """
    state = full_state(model)
    if not _is_first():
        return None
    with torch.device("meta"):
        whole = build_model(model.config)
    try:
        whole.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError("this model's layers were changed (adapters); take full_state instead") from error
    if model.config.text.tie_word_embeddings:
        whole.decoder.tie_lm_head()
    return whole.eval()


def _state(
    model: LanguageModel, optimizers: Sequence[Optimizer], trainable_only: bool, beside: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """What is written, or read into; the tensors are the model's own."""
    options = _options(trainable_only)
    if optimizers:
        model_state, optimizer_state = get_state_dict(model, list(optimizers), options=options)
        state: dict[str, Any] = {"model": model_state, "optimizers": optimizer_state}
    else:
        state = {"model": get_model_state_dict(model, options=options)}
    return state | ({"beside": dict(beside)} if beside else {})


def _take_unsaved(run: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Take out of the optimizers' state, by key, what is there of parameters of which nothing was saved: torch makes a
    state for every parameter before it reads, and a parameter without a gradient so far had none."""
    saved = dcp.FileSystemReader(run).read_metadata().state_dict_metadata
    learnt = {_parameter_of(key.removeprefix("optimizers.")) for key in saved if key.startswith("optimizers.state.")}
    unsaved = [key for key in state if key.startswith("state.") and _parameter_of(key) not in learnt]
    return {key: state.pop(key) for key in unsaved}


def _parameter_of(key: str) -> str:
    """Of `state.decoder.norm.weight.exp_avg`: decoder.norm.weight"""
    return key.removeprefix("state.").rpartition(".")[0]


def _options(trainable_only: bool) -> StateDictOptions:
    """Optimizers by their parameters' names, however they group them."""
    return StateDictOptions(
        flatten_optimizer_state_dict=True, ignore_frozen_params=trainable_only, strict=not trainable_only
    )


def _check_fits(model: LanguageModel, state: Mapping[str, Tensor]) -> None:
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            why = f"is {list(theirs.get(name, ()))} and the model's {list(ours.get(name, ()))}"
            why = "is missing" if name not in theirs else "is not one of the model's" if name not in ours else why
            raise CheckpointError(f"these parameters do not fit the model: {name} {why}")


def _runs(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]


def _make_room(place: Path, aside: Path) -> None:
    if place.exists():
        raise CheckpointError(f"{place} is there already; move it away, or save under another step")
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed while it saved
        aside.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{place} cannot be written: {error}") from error


def _finish(place: Path, aside: Path, extra: dict[str, Any], keep: int | None) -> None:
    try:
        with open(aside / _EXTRA, "w", encoding="utf-8") as file:
            json.dump(extra, file)
            flush(file)  # as torch does with its own files
        flush_folder(aside)
        aside.rename(place)
        flush_folder(place.parent)
        for old in sorted(_runs(place.parent))[: -keep if keep else 0]:
            shutil.rmtree(old)
    except (OSError, TypeError) as error:
        raise CheckpointError(f"{place} cannot be written: {error}") from error


@contextmanager
def _alone() -> Iterator[None]:
    """torch warns a process alone that it is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _on_first(function: Callable[[], None]) -> None:
    """Run on the first process while the others wait; its error is everybody's."""
    failed: list[str | None] = [None]
    if _is_first():
        try:
            function()
        except CheckpointError as error:
            failed = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        raise CheckpointError(failed[0])


def _reason(error: BaseException) -> str:
    """The first line that says something, of the processes' own errors where there are any."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
