"""Saved steps of a run whose model is cut: every process writes its part, and any number of them reads it again.

A saved step is a folder of torch.distributed.checkpoint's files, written aside and renamed as `checkpoint` does it. It
holds what learns, its average and the optimizers' state, each by the parameters' names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..distributed import load_run, read_extra, save_run
from ..models import LanguageModel
from .checkpoint import check_names
from .task import trained


def save(
    folder: Path,
    step: int,
    modules: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    average: Mapping[str, Tensor] | None,
    state: Mapping[str, Any],
) -> Path:
    """Write a step that all processes have taken; all call this together. state: as JSON

    Raises:
        CheckpointError: the folder cannot be written, or its disk is full.
    """
    extra = {**state, "step": step, "names": sorted(trained(modules)), "average": average is not None}
    model = cast(LanguageModel, modules)  # only its parameters' names are asked for
    return save_run(folder, step, model, optimizers, extra=extra, trainable_only=True, beside=average)


def load(
    path: Path,
    modules: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    average: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Fill what learns, the optimizers and the averaged weights from a saved step; returns its state and its number.

    Raises:
        CheckpointError: damaged, or begun by another recipe.
    """
    extra = read_extra(path)
    check_names(path, trained(modules).keys(), extra["names"])
    if not extra["average"]:
        average = None
    return load_run(path, cast(LanguageModel, modules), optimizers, trainable_only=True, beside=average)


def load_whole(path: Path, modules: nn.Module) -> dict[str, Tensor] | None:
    """Fill what learns of a model that one process holds; returns the averaged weights, where there are any."""
    average = None
    if read_extra(path)["average"]:
        average = {name: torch.empty_like(value) for name, value in trained(modules).items()}
    load(path, modules, (), average)
    return average
