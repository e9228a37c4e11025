"""Steps that are prepared ahead of the loop, by worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError

IGNORED = -100  # label of a token that is not learnt

Step = TypeVar("Step")


class _Caught(Dataset[Any]):
    """Steps, or why there is none, as a value: what a worker raises comes back as the text of its traceback."""

    def __init__(self, steps: Dataset[Any]) -> None:
        self.steps = steps

    def __getitem__(self, step: int) -> Any:
        try:
            return self.steps[step]
        except UserError as error:
            return error


def ahead(steps: Dataset[Step], first: int, count: int, workers: int) -> Iterator[Step]:
    """Items `first` to `count` - 1 of a data set whose item s is step s, in their order.

    Raises:
        UserError: what the data set raises, when its turn comes.
    """
    loader: DataLoader[Any] = DataLoader(
        _Caught(steps),
        batch_size=None,
        sampler=range(first, count),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_single_thread,
    )
    for step in loader:
        if isinstance(step, UserError):
            raise step
        yield step


def _single_thread(_: int) -> None:
    torch.set_num_threads(1)
