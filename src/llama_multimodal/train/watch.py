"""Where a run's numbers go: metrics.jsonl, TensorBoard, Weights & Biases; and what they are measured against."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..errors import MissingExtraError
from .config import Progress, Recipe

_METRICS = "metrics.jsonl"


class Watch:
    """Writes each step's numbers down. A resumed run's lines of steps that are taken again are dropped first."""

    def __init__(self, folder: Path, first: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / _METRICS
        if self.file.exists():
            aside = self.file.with_suffix(".partial")
            kept = [line(progress) for progress in lines(folder) if progress.step <= first]
            aside.write_text("".join(kept), encoding="utf-8")
            os.replace(aside, self.file)
        self._boards: list[Any] = []

    @classmethod
    def of(cls, recipe: Recipe, first: int, leads: bool) -> Watch:
        """The one of the process that leads; any other's writes nothing.

        Raises:
            MissingExtraError: TensorBoard or Weights & Biases is asked for and not installed.
        """
        if not leads:
            return _Blind()
        watch = cls(Path(recipe.output), first)
        if recipe.watch.tensorboard:
            watch._boards.append(_TensorBoard(Path(recipe.output) / "tensorboard", first))
        if recipe.watch.wandb is not None:
            watch._boards.append(_WeightsAndBiases(recipe.watch.wandb, recipe))
        return watch

    def log(self, progress: Progress) -> None:
        with open(self.file, "a", encoding="utf-8") as log:
            log.write(line(progress))
        for board in self._boards:
            board.log(progress)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for board in self._boards:
            board.close()


class _Blind(Watch):
    """Of the processes that do not lead."""

    def __init__(self) -> None:
        self._boards = []

    def log(self, progress: Progress) -> None:
        pass


class _TensorBoard:
    def __init__(self, folder: Path, first: int) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise MissingExtraError("watch", "watch.tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first + 1)

    def log(self, progress: Progress) -> None:
        for name, value in progress.values.items():
            self.writer.add_scalar(name, value, progress.step)

    def close(self) -> None:
        self.writer.close()


class _WeightsAndBiases:
    def __init__(self, project: str, recipe: Recipe) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise MissingExtraError("watch", "watch.wandb")
        import dataclasses

        import wandb

        name = Path(recipe.output).name
        settings = dataclasses.asdict(recipe)
        self.run = wandb.init(project=project, name=name, id=name, resume="allow", dir=recipe.output, config=settings)

    def log(self, progress: Progress) -> None:
        self.run.log(dict(progress.values), step=progress.step)

    def close(self) -> None:
        self.run.finish()


def line(progress: Progress) -> str:
    """One step of metrics.jsonl."""
    return json.dumps({"step": progress.step, **progress.values}) + "\n"


def lines(folder: Path) -> Iterator[Progress]:
    """A run's metrics, one entry a step; a last line that a kill cut short is left out."""
    for text in (folder / _METRICS).read_text(encoding="utf-8").splitlines(keepends=True):
        if text.endswith("\n"):
            values = json.loads(text)
            yield Progress(values.pop("step"), values)


def memory_in_use(device: torch.device) -> int:
    """The most bytes that this process has held: on a GPU, or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not a Unix
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@functools.cache
def peak_flops(device: torch.device, dtype: str) -> float:
    """Operations a second of a large matrix product here, against which a model's share is given; measured once."""
    size = 8192 if device.type == "cuda" else 768
    kind = getattr(torch, dtype)
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    best = float("inf")
    for _ in range(4):  # the first warms up
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
