"""Steps that are prepared ahead of the loop, by worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

IGNORED = -100  # label of a token that is not learnt

Step = TypeVar("Step")


def ahead(steps: Dataset[Step], first: int, count: int, workers: int) -> Iterator[Step]:
    """Items `first` to `count` - 1 of a data set whose item s is step s, in their order."""
    loader: DataLoader[Any] = DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, count),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_single_thread,
    )
    yield from loader


def _single_thread(_: int) -> None:
    torch.set_num_threads(1)
