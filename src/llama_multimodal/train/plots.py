"""Draw a run's metrics: losses and token accuracy over steps."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, MissingExtraError
from .loop import Progress, lines

_ANSWER, _AUXILIARY, _ACCURACY = "#1f5fa8", "#c8641e", "#2b7a4b"


def require_matplotlib() -> None:
    """Raises:
    MissingExtraError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("train", "drawing a loss curve")


def plot_run(folder: Path, file: Path | None = None) -> Path:
    """Draw `metrics.jsonl` of a run's folder into `file`, by default `loss.png` in the folder; returns the file.

    Raises:
        ConfigError: the folder holds no metrics.
        MissingExtraError: matplotlib is not installed.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise ConfigError(f"{folder} holds no metrics.jsonl; train there first")
    progress = list(lines(folder))
    if not progress:
        raise ConfigError(f"{folder / 'metrics.jsonl'} is empty; train there first")
    return plot(progress, file or folder / "loss.png")


def plot(progress: Sequence[Progress], file: Path) -> Path:
    """Smoothed curves over the raw ones; a step that learnt no answers (the encoder alone) has no answer loss."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")  # no pyplot: it keeps global state and may look for a display
    FigureCanvasAgg(figure)
    losses, accuracy = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    answered = [p for p in progress if p.answer_loss > 0]
    steps = [p.step for p in answered]
    _curve(losses, steps, [p.answer_loss for p in answered], _ANSWER, "answers")
    _curve(losses, [p.step for p in progress], [p.auxiliary_loss for p in progress], _AUXILIARY, "auxiliary")
    losses.set_yscale("log")
    losses.set_ylabel("loss, nats")
    losses.legend(frameon=False)
    _curve(accuracy, steps, [100 * p.token_accuracy for p in answered], _ACCURACY, "token accuracy")
    accuracy.set_ylabel("tokens right, %")
    accuracy.set_xlabel("step")
    accuracy.set_ylim(0, 100)
    for axes in (losses, accuracy):
        axes.grid(alpha=0.25, which="both" if axes is losses else "major", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    return file


def _curve(axes: Any, steps: Sequence[int], values: Sequence[float], color: str, label: str) -> None:
    if not steps:
        return
    axes.plot(steps, values, color=color, alpha=0.15, linewidth=0.6)
    axes.plot(steps, smoothed(values), color=color, linewidth=1.6, label=label)


def smoothed(values: Sequence[float], window: int | None = None) -> list[float]:
    """An exponential average without the bias of its start; `window` steps, by default a fiftieth of the run."""
    window = window or max(1, len(values) // 50)
    decay = math.exp(-1 / window)
    total = weight = 0.0
    averages = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        averages.append(total / weight)
    return averages
