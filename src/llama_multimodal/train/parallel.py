"""The processes of a data-parallel run: one alone, those that torchrun started, or some that are started here.

Every process holds the whole model and takes its share of each step. Losses are divided by counts of the *whole* step,
so gradients are added up, never averaged, and any number of processes takes the same step.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import TrainingError, UserError
from .config import Progress, Recipe, Report

_AT_ONCE = 1 << 24  # gradients that are exchanged at a time: few messages, and little memory beside the gradients


@dataclass(frozen=True)
class Group:
    """This process among those of its run."""

    rank: int = 0
    size: int = 1
    handle: Any = None  # of torch.distributed; None for a process alone

    @property
    def leads(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def sum(self, values: Tensor) -> list[float]:
        """Numbers added up over all processes; they come to the CPU here."""
        if self.handle is not None:
            dist.all_reduce(values, group=self.handle)
        return values.tolist()

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add every process's gradients; where one process has none, it adds zeros."""
        if self.handle is None:
            return
        for bucket in _buckets(parameters):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
            dist.all_reduce(flat, group=self.handle)
            for parameter, gradient in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = gradient.view_as(parameter)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks."""
        if self.handle is None:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.handle)
        return values


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        full = sum(p.numel() for p in bucket) + parameter.numel() > _AT_ONCE
        if bucket and (full or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


@torch.no_grad()
def wrap(modules: nn.Module, group: Group) -> nn.Module:
    """Modules as the run's processes train them together: all start from the first one's trained weights."""
    if group.handle is not None:
        for parameter in modules.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.data, src=0, group=group.handle)
    return modules


Run = Callable[[Recipe, Group, Report], None]


def launch(run: Run, recipe: Recipe, report: Report) -> None:
    """Call `run` in every process of the recipe's run; only the first reports.

    Raises:
        UserError: what a process could not go on with.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _join(run, recipe, report)
    elif recipe.processes == 1:
        recipe.prepare()
        run(recipe, Group(), report)
    else:
        recipe.prepare()
        _start(run, recipe, report)


def local_rank() -> int:
    """Which of this machine's devices this process is to use."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _take_device() -> None:
    """The GPU of this process, where there is one for it."""
    if local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _join(run: Run, recipe: Recipe, report: Report) -> None:
    """One of torchrun's processes."""
    _take_device()
    dist.init_process_group(_backend())
    try:
        group = Group(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
        if group.leads:
            recipe.prepare()
        dist.barrier()
        run(recipe, group, report if group.leads else _silent)
    finally:
        dist.destroy_process_group()


def _silent(progress: Progress) -> None:
    pass


def _start(run: Run, recipe: Recipe, report: Report) -> None:
    context = torch.multiprocessing.get_context("spawn")
    messages = context.SimpleQueue()
    meeting = Path(recipe.output) / "rendezvous"
    meeting.parent.mkdir(parents=True, exist_ok=True)
    meeting.unlink(missing_ok=True)
    workers = torch.multiprocessing.spawn(
        _worker, args=(run, recipe, messages, str(meeting.resolve())), nprocs=recipe.processes, join=False
    )

    def listen() -> None:
        while not messages.empty():
            message = messages.get()
            if isinstance(message, str):
                raise TrainingError(message)
            report(message)

    try:
        while not workers.join(timeout=0.2):
            listen()
        listen()
    except torch.multiprocessing.ProcessRaisedException:
        listen()  # a user's mistake has a message of its own
        raise
    finally:
        for process in workers.processes:
            process.terminate()


def end_with_parent() -> None:
    """End this process as soon as the one that started it is gone. Killed, that one cannot end it, and workers that
    went on would write into the same run as the next ones."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _worker(rank: int, run: Run, recipe: Recipe, messages: Any, meeting: str) -> None:
    end_with_parent()
    os.environ["LOCAL_RANK"] = str(rank)
    _take_device()
    dist.init_process_group(_backend(), init_method=f"file://{meeting}", rank=rank, world_size=recipe.processes)
    try:
        run(recipe, Group(rank, recipe.processes, dist.group.WORLD), messages.put if rank == 0 else _silent)
    except UserError as error:
        messages.put(str(error))
        raise
    finally:
        dist.destroy_process_group()
