"""What the training loop needs to know of the thing that it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from .config import Recipe

Micro = TypeVar("Micro")


class Task(ABC, Generic[Micro]):
    """A model, the micro-batches of every step, and the loss of each. Which steps there are, what is accumulated,
    summed over processes, clipped and saved is the loop's business.

    recipe: how it is trained. modules: all that is trained and saved; what shall learn requires gradients.
    averaged: the module among them whose averaged weights are kept, with names of its own. num_sums: how many numbers
    `loss` gives to be added up. relief: what to change in a recipe whose steps do not fit in memory.
    """

    num_sums: ClassVar[int]
    relief: ClassVar[str]

    recipe: Recipe
    modules: nn.Module
    averaged: nn.Module
    device: torch.device

    def open_data(self) -> None:
        """Open what is learnt from and asked, before a run's first step; what only exports needs none of it.

        Raises:
            UserError: it cannot be read, or there is nothing in it.
        """

    @abstractmethod
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Made once; a parameter group's `share` is its part of the learning rate, 1 where it says none."""

    @abstractmethod
    def learning_rate(self, step: int) -> float: ...

    @abstractmethod
    def batches(self, first: int) -> Iterator[Sequence[Micro]]:
        """This process's micro-batches of every step from `first` on, which depend on the recipe and the step alone."""

    @abstractmethod
    def totals(self, micro: Sequence[Micro]) -> Tensor:
        """What the loss's terms are means over: fp64, added up over all processes before the step's first `loss`."""

    @abstractmethod
    def loss(self, micro: Micro, totals: Sequence[float], step: int) -> tuple[Tensor | None, Tensor]:
        """This micro-batch's part of the step's loss, None where nothing is learnt; and fp64 sums for `measures`."""

    @abstractmethod
    def measures(self, sums: Sequence[float], totals: Sequence[float], step: int) -> dict[str, float]:
        """What is written down of a step; `loss` is the one to look at."""

    @abstractmethod
    def work(self, micro: Sequence[Micro], step: int) -> dict[str, float]:
        """What this process's part of a step holds, by name, for speeds (`tokens`, `images`); `flops` if known."""

    def check(self, totals: Sequence[float], micro: Sequence[Micro], step: int) -> None:
        """Raises:
        TrainingError: a step that teaches nothing.
        """

    def rows(self, micro: Micro) -> list[str]:
        """What each row of a micro-batch is, for people who look for the one that did harm."""
        return []

    def share_gradients(self) -> None:
        """Tie gradients to each other that must be alike, where no hook on a parameter can; all call this together."""

    def evaluates(self, step: int) -> bool:
        """Whether something held out is asked after this step."""
        return False

    def evaluate(self, step: int) -> dict[str, float]:
        """Numbers on what is held out, the same in all processes; `eval_loss` says which step was best."""
        raise NotImplementedError

    @abstractmethod
    def export(self, folder: Path, weights: Mapping[str, Tensor] | None) -> Path:
        """Write the result, for people to use, into the run's folder; returns where. weights: of `averaged`, in the
        place of the trained ones."""


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def sums(*values: Any) -> Tensor:
    """fp64 scalars side by side, of tensors and numbers; nothing waits for a device."""
    place = next((value.device for value in values if isinstance(value, Tensor)), "cpu")
    return torch.stack([torch.as_tensor(value, device=place).detach().double() for value in values])
