"""Kernels in Triton: for NVIDIA GPUs, and in Triton's interpreter on any machine (TRITON_INTERPRET=1)."""

from __future__ import annotations

import importlib

import torch

_MODULES = (
    "rms_norm",
    "rope",
    "swiglu",
    "linear_gelu",
    "decode_attention",
    "kv_write",
    "cross_attention",
    "packed_linear",
    "linear_cross_entropy",
)


def load() -> str | None:
    """Register the kernels; the reason where they cannot be used here."""
    try:
        knobs = importlib.import_module("triton.knobs")
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    if not knobs.runtime.interpret and not torch.cuda.is_available():
        return "there is no GPU, and TRITON_INTERPRET=1 is not set"
    for module in _MODULES:
        importlib.import_module(f"{__name__}.{module}")
    return None
