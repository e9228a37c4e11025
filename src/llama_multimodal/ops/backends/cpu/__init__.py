"""Kernels in C++ for CPUs: AVX-512 with VNNI, with AMX besides or not, AVX2, or neither, chosen when the library is
loaded.

`LLAMA_MM_CPU_ISA` = amx, avx512, avx2 or plain asks for one of them.
"""

from __future__ import annotations

import importlib

from . import library

_MODULES = ("cross_attention", "decode_attention", "decode_blocks", "elementwise", "packed_linear", "quantized_cache")
_SOME_HAVE = {"attention": lambda: any(map(library.has_attention, library.DTYPES)), "linear": library.has_wide_linear}


def load() -> str | None:
    """Register the kernels; the reason where they cannot be used here."""
    for module in _MODULES:
        importlib.import_module(f"{__name__}.{module}")
    why = library.find()
    for module, there in _SOME_HAVE.items():  # not every instruction set
        if why is None and there():
            importlib.import_module(f"{__name__}.{module}")
    return why
