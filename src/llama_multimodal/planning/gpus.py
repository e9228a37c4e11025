"""Common GPUs, and what of their memory a program can use."""

from __future__ import annotations

from dataclasses import dataclass

CONTEXT_GIB = 0.6
"""What a CUDA context with torch's and our kernels takes of it, roughly."""
TIGHT = 0.92
"""From this share of the usable memory on, what an allocator loses between its blocks may be missing."""


@dataclass(frozen=True)
class Gpu:
    """memory: GiB that CUDA reports in all, a little less than the name says."""

    name: str
    memory: float

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
    Gpu("L4 24 GB", 22.0),
    Gpu("RTX 3090 24 GB", 23.5),
    Gpu("RTX 4090 24 GB", 23.5),
    Gpu("RTX 5090 32 GB", 31.3),
    Gpu("A100 40 GB", 39.4),
    Gpu("L40S 48 GB", 44.4),
    Gpu("A100 80 GB", 79.1),
    Gpu("H100 80 GB", 79.1),
    Gpu("H200 141 GB", 139.7),
    Gpu("B200 180 GB", 178.3),
)
