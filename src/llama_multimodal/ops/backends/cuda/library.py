"""The CUDA library, bound by ctypes: one `Launcher` a kernel, and how an op is made of it.

The library knows neither Python nor torch: `llama_mm_<name>(pointers, sizes, steps, dtype, stream)` starts a kernel on
a stream and returns CUDA's error. Nothing is allocated in there, and nothing waits.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....errors import DeviceError
from ..native import build_report, library_path, why_not_built
from ..operators import mismatch

POINTER, INT64, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
"""What a launcher takes, as csrc declares it: void*, int64_t, int (also for a bool), float."""

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The kernels' dtypes, numbered as in csrc/common.cuh."""

_WAIT = os.environ.get("LLAMA_MM_DEBUG") == "1"  # after each launch, so that an error surfaces at its op


# --- the library -----------------------------------------------------------------------------------------------------


@dataclass
class _Library:
    """device_type: whose tensors the kernels take; "cpu" for the tests, which compile the kernels for it."""

    handle: ctypes.CDLL
    device_type: str
    functions: dict[str, Callable[..., int]] = field(default_factory=dict)

    def function(self, name: str, types: Sequence[type]) -> Callable[..., int]:
        found = self.functions.get(name)
        if found is None:
            found = getattr(self.handle, f"llama_mm_{name}")
            found.argtypes, found.restype = list(types), ctypes.c_int
            self.functions[name] = found
        return found

    def text(self, code: int) -> str:
        function = self.handle.llama_mm_error_string
        function.restype = ctypes.c_char_p
        return function(code).decode()


_library: _Library | None = None


def attach(path: str | os.PathLike[str], device_type: str = "cuda") -> None:
    """Use the library at `path` from now on, for tensors of `device_type`.

    Raises:
        OSError: it cannot be loaded; the message says why.
    """
    global _library
    _library = _Library(ctypes.CDLL(str(path)), device_type)


def find() -> str | None:
    """Attach the library that was built with the package, unless one is attached; the reason where it cannot be."""
    if _library is not None:
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device" + ("" if torch.version.cuda else " (torch was built without CUDA)")
    if why := why_not_built("cuda"):
        return why
    try:
        attach(library_path("cuda"))
    except OSError as error:
        return f"its library cannot be loaded ({error})"
    return _why_not_here()


def _why_not_here() -> str | None:
    """Why an attached library does not run on the current device, or None; then it stays attached."""
    global _library
    assert _library is not None
    torch.cuda.current_stream()  # makes torch's context the one that the library finds
    code = _library.function("probe", ())()
    if code == 0:
        return None
    text, _library = _library.text(code), None
    major, minor = torch.cuda.get_device_capability()
    archs = " ".join((build_report("cuda") or {}).get("archs", ())) or "unknown archs"
    return f"its library does not run on this sm_{major}{minor} (it is built for {archs}; {text})"


def _attached() -> _Library:
    if _library is None:
        raise DeviceError("the CUDA library is not loaded")
    return _library


# --- launching -------------------------------------------------------------------------------------------------------


class Launcher:
    """`llama_mm_<name>` of the library, called with the types given here and a stream behind them.

    Raises:
        DeviceError: CUDA refused the launch; with LLAMA_MM_DEBUG=1 also what went wrong while the kernel ran.
    """

    def __init__(self, name: str, *types: type) -> None:
        self.name, self.types = name, (*types, POINTER)

    def __call__(self, device: torch.device, *arguments: float | None) -> None:
        library = _attached()
        function = library.function(self.name, self.types)
        if device.type == "cpu":
            self._run(library, function, arguments, None)
        elif device.index == torch.cuda.current_device():
            self._run(library, function, arguments, torch.cuda.current_stream(device).cuda_stream)
        else:
            with torch.cuda.device(device):
                self._run(library, function, arguments, torch.cuda.current_stream(device).cuda_stream)

    def _run(
        self, library: _Library, function: Callable[..., int], arguments: tuple[Any, ...], stream: int | None
    ) -> None:
        code = function(*arguments, stream)
        if code == 0 and _WAIT:
            code = library.function("synchronize", (POINTER,))(stream)
        if code:
            raise DeviceError(f"{self.name}: CUDA error {code}, {library.text(code)}")


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(**tensors: Tensor | None) -> str | None:
    """Why the kernels do not take these tensors together: they must be of one dtype and on one device."""
    given = {name: x for name, x in tensors.items() if x is not None}
    name, x = next(iter(given.items()))
    takes = _attached().device_type
    if x.device.type != takes:
        return f"{name} is on {x.device}; takes tensors on {takes}"
    if x.dtype not in DTYPES:
        return f"{name} is {x.dtype}; takes float32, float16 and bfloat16"
    return mismatch(given)


# --- tensors as rows -------------------------------------------------------------------------------------------------


def empty_like(x: Tensor) -> Tensor:
    """Room for a contiguous tensor of x's shape; half the time of `new_empty`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def as_rows(*tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, int, int], tuple[tuple[int, int, int], ...]]:
    """Tensors of one shape as [n0, n1, n2, D] with neighbours along D: themselves, n, each one's steps between rows.

    Any strides will do (transposed heads, a slice of a packed product); what lies otherwise is copied.
    """
    shape = tensors[0].shape
    size = shape[-1]
    if len(shape) > 4:
        tensors = tuple(x.contiguous() for x in tensors)
    if all([x.is_contiguous() for x in tensors]):
        return tensors, (tensors[0].numel() // size, 1, 1), ((size, 0, 0),) * len(tensors)
    tensors = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
    missing = 4 - len(shape)
    n0, n1, n2 = tuple(shape[:-1]) + (1,) * missing
    return tensors, (n0, n1, n2), tuple(x.stride()[:-1] + (0,) * missing for x in tensors)  # type: ignore[misc]
