"""Common GPUs: what of their memory a program can use, and the rates that their makers publish."""

from __future__ import annotations

import re
from dataclasses import dataclass

CONTEXT_GIB = 0.6
"""What a CUDA context with torch's and our kernels takes of it, roughly."""
TIGHT = 0.92
"""From this share of the usable memory on, what an allocator loses between its blocks may be missing."""


@dataclass(frozen=True)
class Gpu:
    """memory: GiB that CUDA reports in all, a little less than the name says.

    bandwidth: of the memory, GB/s. bf16: products of dense matrices with sums in fp32, TFLOPS. Both are of the data
    sheets (SXM modules of the A100, H100, H200 and B200), at clocks that a card does not hold for long.
    """

    name: str
    memory: float
    bandwidth: float
    bf16: float

    @property
    def usable(self) -> int:
        """Bytes that weights, caches and activations can take."""
        return int((self.memory - CONTEXT_GIB) * 2**30)

    def fits(self, num_bytes: int) -> str:
        """yes, tight or no."""
        if num_bytes > self.usable:
            return "no"
        return "tight" if num_bytes > TIGHT * self.usable else "yes"


GPUS = (
    Gpu("L4 24 GB", 22.0, 300, 121),
    Gpu("RTX 3090 24 GB", 23.5, 936, 71),
    Gpu("RTX 4090 24 GB", 23.5, 1008, 165),
    Gpu("RTX 5090 32 GB", 31.3, 1792, 209.5),
    Gpu("A100 40 GB", 39.4, 1555, 312),
    Gpu("L40S 48 GB", 44.4, 864, 362),
    Gpu("A100 80 GB", 79.1, 2039, 312),
    Gpu("H100 80 GB", 79.1, 3350, 989),
    Gpu("H200 141 GB", 139.7, 4800, 989),
    Gpu("B200 180 GB", 178.3, 8000, 2250),
)


def gpu_named(name: str, memory: float) -> Gpu | None:
    """The card of a device's own name ("NVIDIA H100 80GB HBM3") and memory in GiB, if it is one of these; its PCIe,
    NVL, Ti, D and laptop variants and MIG slices, whose rates are others, are not."""
    words = re.split(r"[\s-]+", name.upper())
    if {"PCIE", "NVL", "TI", "D", "LAPTOP", "MIG"} & set(words):
        return None
    for gpu in GPUS:
        *kind, _, _ = gpu.name.upper().split()
        if set(kind) <= set(words) and abs(memory - gpu.memory) < 0.05 * gpu.memory:
            return gpu
    return None
