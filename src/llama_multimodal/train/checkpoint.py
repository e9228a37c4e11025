"""Saving a run so that it can be killed at any moment: write aside, flush to disk, rename."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a run's state; an interrupted write leaves the previous file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    with open(aside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def load_state(path: Path) -> dict[str, Any] | None:
    """A run's state, or None where there is none.

    Raises:
        CheckpointError: the file is there and cannot be read.
    """
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"cannot resume from {path} ({error}); move it away to start anew") from error
