"""Draw a run's metrics over its steps: losses, and below them how much is right or how the rate went."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, MissingExtraError
from .config import Progress
from .watch import lines

_LOSSES = {
    "loss": ("answers", "#1f5fa8"), "answer_loss": ("answers", "#1f5fa8"), "auxiliary_loss": ("auxiliary", "#c8641e"),
    "eval_loss": ("held out", "#7a3b8f"),
}  # fmt: skip
_SHARES = {
    "token_accuracy": ("token accuracy", "#2b7a4b"), "eval_exact_match": ("exact answers", "#2b7a4b"),
    "eval_anls": ("ANLS", "#8a8a2b"),
}  # fmt: skip
_RATE = "learning_rate"


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
    """Smoothed curves over the raw ones."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")  # no pyplot: it keeps global state and may look for a display
    FigureCanvasAgg(figure)
    losses, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for name, (label, color) in _LOSSES.items():
        # A step that learnt no answers (the encoder alone) has no answer loss.
        points = [(p.step, p.values[name]) for p in progress if p.values.get(name, 0.0) > 0]
        _curve(losses, points, color, label)
    losses.set_yscale("log")
    losses.set_ylabel("loss, nats")
    losses.legend(frameon=False)
    shares = [name for name in _SHARES if any(name in p.values for p in progress)]
    answered = [p for p in progress if p.values.get("answer_loss", 1.0) > 0]
    for name in shares:
        _curve(below, [(p.step, 100 * p.values[name]) for p in answered if name in p.values], *reversed(_SHARES[name]))
    if shares:
        below.set_ylabel("right, %")
        below.set_ylim(0, 100)
        below.legend(frameon=False)
    else:
        below.plot([p.step for p in progress], [p.values.get(_RATE, 0.0) for p in progress], color="#555555")
        below.set_ylabel("learning rate")
    below.set_xlabel("step")
    for axes in (losses, below):
        axes.grid(alpha=0.25, which="both" if axes is losses else "major", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    return file


def _curve(axes: Any, points: Sequence[tuple[int, float]], color: str, label: str) -> None:
    if not points:
        return
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=color, alpha=0.15, linewidth=0.6)
    axes.plot(steps, smoothed(values), color=color, linewidth=1.6, label=label, marker="." if len(steps) < 20 else None)


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
