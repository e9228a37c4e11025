"""What the Triton kernels share: how a kernel is launched, and which tensors it takes.

Block sizes come from plain functions of the shapes, never from a tuner that measures: the same input gives the same
kernel on every run, and nothing waits for a device.

Shapes: R rows · D columns
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....errors import DeviceError
from ..operators import mismatch

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Kernels run in numpy, on CPU tensors too. Fixed when triton is imported."""

WIDE = {
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
"""What a kernel computes in, by what it reads."""

_WAIT = os.environ.get("LLAMA_MM_DEBUG") == "1"  # after each launch, so that an error surfaces at its op

LOG2_E = tl.constexpr(math.log2(math.e))
"""Softmax is taken in powers of two: `exp2` is an instruction, `exp` is not."""


@triton.jit
def widen(x, UPCAST: tl.constexpr):
    """A factor of a matrix product; UPCAST for the interpreter, which multiplies bfloat16 as if it were integers."""
    return x.to(tl.float32) if UPCAST else x


def upcasts(x: Tensor) -> bool:
    return INTERPRETED and x.dtype == torch.bfloat16


def launch(kernel: Any, programs: int, *args: Any, warps: int = 4, stages: int = 2, **constants: Any) -> None:
    """Run a kernel's programs on the device and current stream of its first argument.

    Raises:
        DeviceError: with LLAMA_MM_DEBUG=1, what went wrong while the kernel ran.
    """
    if programs == 0:
        return
    first = args[0]
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[(programs,)](*args, **constants, num_warps=warps, num_stages=stages)
        if _WAIT and first.is_cuda:
            _wait(kernel)


def _wait(kernel: Any) -> None:
    try:
        torch.cuda.current_stream().synchronize()
    except RuntimeError as error:
        name = kernel.fn.__module__.rpartition(".")[2] + kernel.fn.__name__
        raise DeviceError(f"{name}: {str(error).splitlines()[0]}") from error


def power(n: int) -> int:
    """The power of two from n up: what a block's side must be."""
    return 1 << max(0, n - 1).bit_length()


def tile(rows: int, columns: int, values: int, most: int) -> tuple[int, int, int]:
    """Rows and columns of a block of about `values` values, columns first and `most` of them at most; and warps for it.

    16 values a thread are two 16-byte loads of a half-precision tensor.
    """
    width = min(power(columns), most)
    height = min(power(rows), max(1, values // width))
    return height, width, min(16, max(1, height * width // 512))


# --- tensors as rows -------------------------------------------------------------------------------------------------


def order(x: Tensor) -> list[int]:
    """A tensor's leading axes, widest stride first: in this order its rows lie one after the other in memory."""
    leading = range(x.ndim - 1)
    return list(leading) if x.is_contiguous() else sorted(leading, key=lambda axis: -x.stride()[axis])


def as_rows(x: Tensor, axes: Sequence[int]) -> Tensor:
    """[R, D] with neighbours along D: a view where strides allow it (transposed heads, a slice of a packed product)."""
    rows = x.permute(*axes, -1).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return unit_last(rows)


def empty_rows(x: Tensor, axes: Sequence[int], columns: int | None = None) -> Tensor:
    """Room for x's shape (with another last axis), dense, rows in the order of `axes`."""
    columns = x.shape[-1] if columns is None else columns
    back = sorted(range(len(axes)), key=lambda place: axes[place])
    return x.new_empty([*(x.shape[axis] for axis in axes), columns]).permute(*back, -1)


def unit_last(x: Tensor) -> Tensor:
    """x, or a copy of it in which neighbours along the last axis are neighbours in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(**tensors: Tensor | None) -> str | None:
    """Why kernels do not take these tensors together: their devices and dtypes must be one."""
    given = {name: x for name, x in tensors.items() if x is not None}
    name, x = next(iter(given.items()))
    if not x.is_cuda and not (INTERPRETED and x.device.type == "cpu"):
        return f"{name} is on {x.device}; takes a GPU's tensors (the CPU's where TRITON_INTERPRET=1 is set)"
    if x.dtype not in WIDE:
        return f"{name} is {x.dtype}; takes float32, float16, bfloat16 and float64"
    return mismatch(given)


def refused_indices(x: Tensor, **indices: Tensor | None) -> str | None:
    """Why kernels do not take these whole numbers beside x."""
    for name, y in indices.items():
        if y is not None and y.device != x.device:
            return f"{name} is on {y.device}; takes {x.device}, where the other tensors are"
        if y is not None and y.dtype not in (torch.int32, torch.int64):
            return f"{name} is {y.dtype}; takes int32 or int64"
    return None
