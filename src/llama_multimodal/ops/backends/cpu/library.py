"""The compiled kernels: where they are, their C signatures, and the pointers that they take."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch
from torch import Tensor

from ....errors import DeviceError
from ... import _dispatch
from ..native import library_path, why_not_built

INSTRUCTION_SETS = ("amx", "avx512", "avx2", "plain")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""The dtypes that kernels take, and their numbers in C."""

QUANTIZED = {torch.int8: 2, torch.float8_e4m3fn: 3}
"""Those of caches in 8 bits."""

_POINTER, _INT, _SIZE, _TEXT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_char_p
_KEYS = [_POINTER, _POINTER, _POINTER, _POINTER]  # k, its strides, v, its strides
_STORED = [_INT, _POINTER, _POINTER]  # the cache's dtype, k's and v's scales
_QUERIES = [_POINTER, _INT, _SIZE, _SIZE, _SIZE, _SIZE]  # q, dtype, B, H, Hkv, D
_WEIGHT = [_POINTER, _POINTER, _POINTER, _INT, _SIZE]  # values, scales, zeros, int4, G
_BLOCKS = [  # pointers and numbers of L blocks, L, eps, dtype, H, Hkv, D, x, B, cos, sin
    *[_TEXT, _TEXT, _INT, ctypes.c_float, _INT, _SIZE, _SIZE, _SIZE],
    *[_POINTER, _INT, _POINTER, _POINTER],
]
_SIGNATURES = {  # without the llama_mm_cpu_ that every name begins with
    "instruction_set": ([], _TEXT),
    "use_instruction_set": ([_TEXT], _INT),
    "packed_linear": (
        [_POINTER, _INT, _INT, _INT, _SIZE, *_WEIGHT, _POINTER, _INT, _SIZE, _POINTER, _INT],
        _INT,
    ),
    "bf16_linear": ([_POINTER, _INT, _INT, _SIZE, _POINTER, _POINTER, _INT, _SIZE, _POINTER, _INT], _INT),
    "use_pairs": ([_INT], _INT),
    "has_wide_linear": ([], _INT),
    "has_tile_linear": ([_INT, _SIZE], _INT),
    "wide_linear": ([_POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _INT, _SIZE, _POINTER, _INT], _INT),
    "has_attention": ([_INT], _INT),
    "attention": (
        [_INT, _POINTER, _POINTER, *_KEYS, *[_SIZE] * 6, _INT, _POINTER, _POINTER, _POINTER, _INT],
        _INT,
    ),
    "rms_norm": ([*[_POINTER] * 3, _INT, _SIZE, _SIZE, ctypes.c_float, _POINTER, _POINTER, _INT], None),
    "swiglu": ([_POINTER, _SIZE, _POINTER, _SIZE, _INT, _SIZE, _SIZE, _POINTER, _INT], None),
    "apply_rope": (
        [
            *[_POINTER, _POINTER, _SIZE] * 2,  # q and k, their strides and heads
            *[_POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE],  # cos, sin, their steps, positions, P
            *[_INT, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _INT],
        ],
        _INT,
    ),
    "unpack_tiles": ([*_WEIGHT, _SIZE, _SIZE, _SIZE, _INT, _POINTER, _INT], None),
    "decode_attention": ([*_QUERIES, *_KEYS, _SIZE, _POINTER, _POINTER, _POINTER, _INT], _INT),
    "decode_blocks": ([*_BLOCKS, *_KEYS, _SIZE, _POINTER, _POINTER, _INT], _INT),
    "paged_decode_blocks": (
        [*_BLOCKS, *_KEYS, *_STORED, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER, _INT],
        _INT,
    ),
    "paged_decode_attention": (
        [*_QUERIES, *_KEYS, *_STORED, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER, _INT],
        _INT,
    ),
    "cross_attention": ([*_QUERIES, *_KEYS, _SIZE, _POINTER, _POINTER, _INT], _INT),
    "quantized_kv_write": (
        [*_KEYS, _INT, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, *_STORED, _SIZE, _POINTER, _INT],
        _INT,
    ),
    "kv_write": (
        [_POINTER, _POINTER, _POINTER, _POINTER, _INT, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _SIZE, _POINTER, _INT],
        _INT,
    ),
}


_library: ctypes.CDLL | None = None
_instruction_set = ""  # empty where the environment asks for one that is not there


def attach(path: str | Path) -> None:
    """Use the library at `path` from now on. torch is loaded before it and lends it its OpenMP threads.

    Raises:
        OSError: it cannot be loaded. AttributeError: it is another version's. Both say why.
    """
    global _library, _instruction_set
    library = ctypes.CDLL(str(path))
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(library, f"llama_mm_cpu_{name}")
        function.argtypes, function.restype = arguments, result
        setattr(library, name, function)
    _library, _instruction_set = library, (library.instruction_set() or b"").decode()


def find() -> str | None:
    """Attach the library that was built with the package, unless one is attached already; the reason if not."""
    if _library is None:
        if why := why_not_built("cpu"):
            return why
        try:
            attach(library_path("cpu"))
        except (OSError, AttributeError) as error:
            return f"its library cannot be loaded ({error})"
    if not _instruction_set:
        asked = os.environ.get("LLAMA_MM_CPU_ISA")
        return f'LLAMA_MM_CPU_ISA asks for "{asked}"; this machine has no such thing of {", ".join(INSTRUCTION_SETS)}'
    return None


def functions() -> ctypes.CDLL:
    """The attached library; its functions have short names."""
    if _library is None:
        raise DeviceError("the CPU library is not loaded")
    return _library


def instruction_set() -> str:
    """The one in use."""
    return _instruction_set


@_dispatch.constant
def has_attention(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for attention of many queries."""
    return dtype in DTYPES and bool(functions().has_attention(DTYPES[dtype]))


@_dispatch.constant
def has_wide_linear() -> bool:
    """Whether there is a kernel for products of bf16 in fp32."""
    return bool(functions().has_wide_linear())


@_dispatch.constant
def has_tile_linear(inputs: int) -> bool:
    """Whether there is a kernel for products of so many bf16 inputs on a matrix unit."""
    return bool(functions().has_tile_linear(DTYPES[torch.bfloat16], inputs))


def use_instruction_set(name: str) -> bool:
    """Run another instruction set's kernels from now on, for tests; False where this machine has no such thing."""
    global _instruction_set
    if functions().use_instruction_set(name.encode()):
        return False
    _instruction_set = name
    return True


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def strides(tensor: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """All but the last dimension's, which the kernels take to be 1."""
    return (ctypes.c_int64 * (tensor.ndim - 1))(*tensor.stride()[:-1])


def dense_last(tensor: Tensor) -> Tensor:
    """The same tensor, or a copy where its last dimension has gaps."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
