"""A thread in which llama.cpp computes, and nothing else does.

A thread sets the shape of its matrix registers (AMX) once in llama.cpp, and torch takes it away again: in a shared
thread llama.cpp ends in an illegal instruction. OpenMP gives each thread that begins a parallel region helpers of its
own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@functools.cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "llama.cpp")


def in_own_thread(function: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return _thread().submit(function, *args, **kwargs).result()

    return run
