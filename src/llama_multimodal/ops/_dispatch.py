"""Which backend runs an op.

A backend is a package under `ops/backends/` whose modules mirror the ops' file names. The torch reference lives in
each op's own file and is always there. The choice depends on static facts only (the forced backend, the device), so
that it neither waits for a device nor breaks a compiled graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..config import nearest
from ..errors import DeviceError

BACKENDS = ("cuda", "triton", "cpu", "torch")

_forced: ContextVar[str | None] = ContextVar("llama_mm_backend", default=None)
_kernels: dict[tuple[str, str], Callable[..., Any]] = {}


def register(op: str, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: this function implements `op` on `backend`, with the op's own signature."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _kernels[op, backend] = function
        return function

    return add


def requested_backend() -> str | None:
    """The backend that `use_backend` or `LLAMA_MM_BACKEND` asks for; None leaves the choice to the dispatch."""
    name = _forced.get() or os.environ.get("LLAMA_MM_BACKEND") or None
    if name is not None:
        _check_name(name)
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op on one backend inside the `with` block.

    Raises:
        DeviceError: no backend of that name. An op without a kernel on it raises when it is called.
    """
    _check_name(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(op: str, default: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation of `op` to call now; `default` is its torch reference."""
    name = requested_backend()
    if name is None or name == "torch":
        return default
    if (op, name) not in _kernels:
        raise DeviceError(f'backend "{name}" has no kernel for {op}; unset LLAMA_MM_BACKEND or use "torch"')
    return _kernels[op, name]


def available() -> dict[str, list[str]]:
    """Backends that hold a kernel, by op; torch always does."""
    table: dict[str, list[str]] = {}
    for op, backend in _kernels:
        table.setdefault(op, []).append(backend)
    return table


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise DeviceError(f'unknown backend "{name}"{nearest(name, BACKENDS)}; known: {", ".join(BACKENDS)}')
