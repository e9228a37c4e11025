"""Kernels in C++ for CPUs: AVX-512 with VNNI, AVX2, or neither, chosen when the library is loaded.

`LLAMA_MM_CPU_ISA` = avx512, avx2 or plain asks for one of them.
"""

from __future__ import annotations

import importlib

from . import library

_MODULES = ("cross_attention", "decode_attention", "decode_block", "packed_linear", "quantized_cache")


def load() -> str | None:
    """Register the kernels; the reason where they cannot be used here."""
    for module in _MODULES:
        importlib.import_module(f"{__name__}.{module}")
    why = library.find()
    if why is None and library.has_attention():
        importlib.import_module(f"{__name__}.attention")
    return why
