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

from ..distributed import load_run, save_run
from ..models import LanguageModel
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
    shapes = {name: list(value.shape) for name, value in trained(modules).items()}
    extra = {**state, "step": step, "shapes": shapes, "average": average is not None}
    model = cast(LanguageModel, modules)  # only its parameters' names are asked for
    return save_run(folder, step, model, optimizers, extra=extra, trainable_only=True, beside=average)


def load(
    path: Path,
    modules: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    average: Mapping[str, Tensor] | None = None,
) -> None:
    """Fill what learns, the optimizers and the averaged weights from a saved step, cut or whole; all call this
    together.

    Raises:
        CheckpointError: damaged, or it does not fit.
    """
    load_run(path, cast(LanguageModel, modules), optimizers, trainable_only=True, beside=average)
