"""Processes that run functions together. They are started once and asked many times, and forked from one that has read
torch: reading it takes as long as most of what they are asked."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Group = Callable[..., list[Any]]
"""Runs a module's function on some processes at once; what each returned, by rank."""

_PATIENCE = 280  # seconds
_READ_BEFORE = ["torch", "llama_multimodal.train.loop", "llama_multimodal.train.chat.task"]


class Ranks:
    """`ranks(count, function, *args)` runs a module's function on so many processes at once, which are one group; what
    each returned, by rank."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._calls = 0

    def __call__(self, count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        self._start(count)
        self._calls += 1
        meeting = Path(self._folder.name) / str(self._calls)
        for pipe in self._pipes[:count]:
            pipe.send_bytes(pickle.dumps((count, meeting, function, args)))
        answers: dict[int, Any] = {}
        end = time.monotonic() + _PATIENCE
        while len(answers) < count:
            for rank, pipe in enumerate(self._pipes[:count]):
                if rank not in answers and pipe.poll(0.02):
                    well, answers[rank] = pickle.loads(pipe.recv_bytes())
                    if not well:
                        self._stop()
                        raise AssertionError(f"rank {rank}:\n{answers[rank]}")
            if time.monotonic() > end:
                self._stop()
                raise AssertionError(f"ranks {sorted(set(range(count)) - answers.keys())} did not answer")
        return [answers[rank] for rank in range(count)]

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_READ_BEFORE)
        for rank in range(len(self._processes), count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def close(self) -> None:
        self._stop()
        self._folder.cleanup()


def _serve(rank: int, pipe: Connection) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    while True:
        try:
            count, meeting, function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the tests have ended
            return
        try:
            # A group of its own for each call: the threads of every group that a function makes would stay with it.
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
            try:
                answer = True, function(*args)
            finally:
                dist.destroy_process_group()
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
