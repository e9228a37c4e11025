"""Which backend runs an op.

A backend is a package under `ops/backends/` whose modules mirror the ops' file names and register their kernels here
when the package is first needed. The torch reference lives in each op's own file and is always there. The choice
depends on static facts only (the forced backend; device, dtype, shapes; whether gradients are wanted), so that it
neither waits for a device nor breaks a compiled graph; a compiled graph keeps the backend of its first run.

Left to itself the dispatch takes the first of cuda, triton, cpu whose kernel takes the arguments, else the reference.
A forced backend must take them where it has a kernel for the op at all; what a backend leaves to torch by design, whole
ops or some shapes of one (prefill attention, say), runs as the reference.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import nearest
from ..errors import DeviceError

BACKENDS = ("cuda", "triton", "cpu", "torch")
# On whose tensors a backend works by itself; forced, it says for itself what it takes.
_AUTOMATIC = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}

_forced: ContextVar[str | None] = ContextVar("llama_mm_backend", default=None)

Result = TypeVar("Result")
Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """What `torch.compiler.assume_constant_result` does. That imports the compiler, which takes more than half a
    second, and whoever compiles nothing has no use for it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Kernel:
    """One op on one backend.

    function: has the op's own signature. refuses: called with the same arguments; why it cannot take them, or None.
    leaves: likewise; whether they are left to the next backend by design, even where this one is forced.
    differentiable: whether autograd can go through it.
    """

    function: Callable[..., Any]
    refuses: Callable[..., str | None]
    leaves: Callable[..., bool]
    differentiable: bool


_kernels: dict[tuple[str, str], Kernel] = {}


def register(
    op: str,
    backend: str,
    *,
    refuses: Callable[..., str | None] = lambda *_, **__: None,
    leaves: Callable[..., bool] = lambda *_, **__: False,
    differentiable: bool = False,
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Decorator: this function implements `op` on `backend`."""

    def add(function: Callable[..., Result]) -> Callable[..., Result]:
        _kernels[op, backend] = Kernel(function, refuses, leaves, differentiable)
        return function

    return add


def call(op: str, reference: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Run an op on the backend that is forced, or on the first that takes the arguments.

    Raises:
        DeviceError: the forced backend is not there, or does not take these arguments; the message says why.
    """
    forced = requested_backend()
    if forced == "torch":
        return reference(*args, **kwargs)
    if forced is not None:
        if missing := why_missing(forced):
            raise DeviceError(f'backend "{forced}" cannot be used here: {missing}')
        kernel = _kernels.get((op, forced))
        if kernel is None or kernel.leaves(*args, **kwargs):
            return reference(*args, **kwargs)
        if why := _objection(kernel, args, kwargs):
            raise DeviceError(f'{op} on backend "{forced}": {why}; use_backend("torch") takes anything')
        return kernel.function(*args, **kwargs)
    device = next(a.device.type for a in args if isinstance(a, Tensor))
    for backend in _AUTOMATIC.get(device, ()):
        if why_missing(backend) is None:
            kernel = _kernels.get((op, backend))
            if kernel is None or kernel.leaves(*args, **kwargs):
                continue
            if _objection(kernel, args, kwargs) is None:
                return kernel.function(*args, **kwargs)
    return reference(*args, **kwargs)


def _objection(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
    if not kernel.differentiable and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "the kernel has no backward, and a gradient is wanted"
    return kernel.refuses(*args, **kwargs)


@functools.cache
@constant
def why_missing(backend: str) -> str | None:
    """Why a backend cannot be used on this machine, or None; its kernels are registered by the first call."""
    if backend == "torch":
        return None
    try:
        package = importlib.import_module(f"{__package__}.backends.{backend}")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith(f"{__package__}.backends"):
            raise
        return "this version has no such kernels"
    if package.__file__ is None:  # a folder without modules: all that is there is a build report
        return "this version has no such kernels"
    return package.load()


@constant
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
        DeviceError: no backend of that name, or it is not there on this machine.
    """
    _check_name(name)
    if missing := why_missing(name):
        raise DeviceError(f'backend "{name}" cannot be used here: {missing}')
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def available() -> dict[str, list[str]]:
    """Backends that hold a kernel and can be used here, by op; torch always does."""
    table: dict[str, list[str]] = {}
    for backend in BACKENDS[:-1]:
        if why_missing(backend) is None:
            for op in sorted(op for op, other in _kernels if other == backend):
                table.setdefault(op, []).append(backend)
    return table


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise DeviceError(f'unknown backend "{name}"{nearest(name, BACKENDS)}; known: {", ".join(BACKENDS)}')
