"""The processes of a run: one alone, those that torchrun started, or some that are started here.

One that fails ends the run, with its own error and no other: what the others meet then, a neighbour that is gone, is
not what went wrong.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..distributed import make_mesh, worker
from ..errors import TrainingError, UserError
from .config import Progress, Recipe, Report
from .parallel import Group

Run = Callable[[Recipe, Group, Report], None]

_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Connection refused",
)
"""What gloo and nccl say of a process that has ended."""
_LAST_WORDS = 3.0  # seconds that a process which ended has for its message to arrive


class _Lost(TrainingError):
    """Another process is gone. Torchrun's report has it, in case that none says why; people are told by that one."""


def launch(run: Run, recipe: Recipe, report: Report) -> None:
    """Call `run` in every process of the recipe's run; only the first reports.

    Raises:
        UserError: what a process could not go on with.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        try:
            worker(_join)(run, recipe, report)
        except _Lost:
            raise SystemExit(2) from None
        return
    recipe.sharing.mesh(recipe.processes)
    recipe.prepare()
    if recipe.processes == 1:
        run(recipe, Group(), report)
    else:
        _start(run, recipe, report)


def local_rank() -> int:
    """Which of this machine's devices this process is to use."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def num_processes(recipe: Recipe) -> int:
    """How many the recipe's run has, if it is started from here."""
    return int(os.environ.get("WORLD_SIZE", recipe.processes))


def _join(run: Run, recipe: Recipe, report: Report) -> None:
    """One of torchrun's processes."""
    mesh = make_mesh(recipe.sharing.mesh(int(os.environ["WORLD_SIZE"])), recipe.device_type)
    group = Group.of(mesh)
    if group.leads:
        recipe.prepare()
    dist.barrier()
    _guarded(run, recipe, group, report if group.leads else _silent)


def _guarded(run: Run, recipe: Recipe, group: Group, report: Report) -> None:
    try:
        run(recipe, group, report)
    except RuntimeError as error:
        if any(words in str(error) for words in _GONE):
            raise _Lost("the connection to another process broke: it has ended, or cannot be reached") from error
        raise


def _silent(progress: Progress) -> None:
    pass


# --- processes that are started here ----------------------------------------------------------------------------------


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
    except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException) as error:
        until = time.monotonic() + _LAST_WORDS
        while time.monotonic() < until:  # a user's mistake has a message of its own
            listen()
            _say_who_was_killed(workers.processes)
            time.sleep(0.05)
        raise error
    finally:
        for process in workers.processes:
            process.terminate()


def _say_who_was_killed(processes: list[Any]) -> None:
    for rank, process in enumerate(processes):
        code = process.exitcode
        if code is not None and code < 0 and -code != signal.SIGTERM:  # those that torch ends in its turn
            name = signal.Signals(-code).name
            raise TrainingError(
                f"process {rank} of this run was killed ({name}), by the system where memory runs out; the same command"
                " goes on from the last saved step"
            )


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
    backend = "cpu:gloo,cuda:nccl" if recipe.device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=recipe.processes)
    try:
        group = Group.of(make_mesh(recipe.sharing.mesh(recipe.processes), recipe.device_type))
        worker(_guarded)(run, recipe, group, messages.put if group.leads else _silent)
    except UserError as error:
        if not isinstance(error, _Lost):
            messages.put(str(error))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
