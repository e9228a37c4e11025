"""A process in which llama.cpp computes, and neither torch nor we do.

libgomp counts the threads of all its teams in a process. Where they are more than the cores, as with torch's and those
of another thread, none waits awake at a barrier any more: on an Intel Xeon llama.cpp decoded SmolLM2 135M at 35
tokens/s in a second thread beside torch, and at 91 in a process of its own. Both also set AMX's registers as they like.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

_ASLEEP = 0.01
"""Seconds after which OpenMP's threads, which wait awake for work at first, have left the cores to others."""


def call(module: str, function: str, *args: Any) -> Any:
    """What a function of one of the benchmarks' modules returns in that process. Plain values and arrays go there."""
    pipe = _pipe()
    pipe.send((module, function, args))
    value, error = pipe.recv()
    if error is not None:
        raise RuntimeError(f"in llama.cpp's process: {error}")
    return value


def settle() -> None:
    """Wait until no thread waits awake on a core that another process is about to use."""
    time.sleep(_ASLEEP)


@functools.cache
def _pipe() -> Connection:
    here, there = multiprocessing.Pipe()
    # A thread that is bound to a core hands that on to what it starts; all of them together have all cores.
    cores = set().union(*(os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")))
    descriptor = there.fileno()
    argv = [sys.executable, __file__, str(descriptor), *map(str, sorted(cores))]
    subprocess.Popen(argv, pass_fds=[descriptor])  # ends where the pipe does
    there.close()
    return here


def _serve(pipe: Connection) -> None:
    while True:
        try:
            module, function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((getattr(importlib.import_module(module), function)(*args), None))
        except Exception as error:
            pipe.send((None, f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    os.sched_setaffinity(0, [int(core) for core in sys.argv[2:]])  # before any library asks for it
    _serve(Connection(int(sys.argv[1])))
