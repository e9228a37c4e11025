"""Kernels in CUDA C++ for NVIDIA GPUs."""

from __future__ import annotations

import importlib

from . import library

_MODULES = ("cross_attention", "decode_attention", "linear_gelu", "packed_linear", "rms_norm", "rope", "swiglu")


def load() -> str | None:
    """Register the kernels; the reason where they cannot be used here."""
    for module in _MODULES:
        importlib.import_module(f"{__name__}.{module}")
    return library.find()
