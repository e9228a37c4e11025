"""Saving a run so that it can be killed at any moment.

A saved step is a folder: `weights.safetensors` (what learns), `average.safetensors` (their average, where one is kept)
and `state.pt` (optimizers, the position in the data, the best score so far). It is written aside, flushed to the disk
and renamed, so that a folder with a step's name is always whole; random numbers need no saving, since each step draws
its own from the seed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..weights.io import SafetensorsFile, TensorInfo, flush, flush_folder, write_safetensors

_NAME = "step-{:08d}"
_PATTERN = re.compile(r"step-(\d{8,})")
_WRITING, _REMOVING = ".writing-", ".removing-"
_LEFT = (f"{_WRITING}*", f"{_REMOVING}*", "step-*.partial")
"""What an interruption leaves behind; the last is of runs that several processes write."""


@dataclass(frozen=True)
class Saved:
    """A run after `step` steps.

    weights, average: by the parameter's name. state: plain values and tensors, what optimizers remember among them.
    Of a step that was read, tensors lie in the files' pages: nothing is in memory before it is copied from there.
    """

    step: int
    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None = None
    state: dict[str, Any] = field(default_factory=dict)


def save(folder: Path, saved: Saved) -> Path:
    """Write a saved step into `folder`; an interruption leaves nothing that counts as one.

    Raises:
        CheckpointError: the folder cannot be written, or its disk is full.
    """
    target = folder / _NAME.format(saved.step)
    aside = folder / f"{_WRITING}{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        _write_tensors(aside / "weights.safetensors", saved.weights)
        if saved.average is not None:
            _write_tensors(aside / "average.safetensors", saved.average)
        with open(aside / "state.pt", "wb") as file:
            torch.save({**saved.state, "step": saved.step}, file)
            flush(file)
        flush_folder(aside)
        if target.exists():  # the same step again, of a run that was set back
            _remove(target)
        os.replace(aside, target)
        flush_folder(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error.strerror or error}); free some space") from error
    return target


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    infos = {name: TensorInfo(tuple(tensors[name].shape), tensors[name].dtype) for name in order}
    write_safetensors(path, infos, ((name, tensors[name]) for name in order))


def _remove(path: Path) -> None:
    """A saved step is renamed before it is deleted: half a folder never has a step's name."""
    going = path.with_name(f"{_REMOVING}{path.name}")
    shutil.rmtree(going, ignore_errors=True)
    os.replace(path, going)
    shutil.rmtree(going)


def saved_steps(folder: Path) -> dict[int, Path]:
    """The saved steps in a folder, in their order."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _PATTERN.fullmatch(path.name))]
    return dict(sorted(found))


def prune(folder: Path, keep_last: int, best: int | None = None) -> None:
    """Delete all but the last saved steps and the best one, and what interrupted runs left behind."""
    steps = saved_steps(folder)
    for step in list(steps)[:-keep_last]:
        if step != best:
            _remove(steps[step])
    for left in (path for pattern in _LEFT for path in folder.glob(pattern)):
        shutil.rmtree(left, ignore_errors=True)


def load(path: Path) -> Saved:
    """Raises:
    CheckpointError: a file is missing or damaged.
    """
    try:
        weights, average = path / "weights.safetensors", path / "average.safetensors"
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True, mmap=True)
        return Saved(state.pop("step"), _tensors(weights), _tensors(average) if average.exists() else None, state)
    except Exception as error:
        raise CheckpointError(f"cannot resume from {path} ({error}); move it away to go on without it") from error


def check_shapes(path: Path, ours: Mapping[str, Sequence[int]], saved: Mapping[str, Sequence[int]]) -> None:
    """Raises:
    CheckpointError: other weights learn than those that were saved.
    """
    for name in sorted({*ours} | {*saved}):
        if name in ours and name in saved and [*ours[name]] == [*saved[name]]:
            continue
        how = f"does not train {name}" if name not in ours else f"trains {name}"
        if name in ours and name in saved:
            how = f"has {name} as {[*ours[name]]}, not {[*saved[name]]}"
        raise CheckpointError(f"{path} was begun by another recipe: this one {how}; take another output or that recipe")


def _tensors(path: Path) -> dict[str, Tensor]:
    file = SafetensorsFile(path)
    return {name: file.tensor(name) for name in file.entries}


def last_path(folder: Path) -> Path | None:
    """Where the last saved step lies."""
    steps = saved_steps(folder)
    return steps[max(steps)] if steps else None
