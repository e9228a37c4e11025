"""Memory for weights in huge pages, where the system lends them on request (Linux).

Every token reads every weight. In pages of 4 KiB a core spends a part of that time looking pages up: decoding with bf16
weights was 15 % slower.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_SIZE = 2 << 20


def empty_parameter(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a parameter, on the CPU in huge pages where there are any and it is large enough."""
    value = torch.empty(shape, dtype=dtype, device=device)
    if _LIBC is not None and device.type == "cpu" and value.nbytes >= _SIZE:
        first = -(-value.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (value.data_ptr() + value.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_HUGEPAGE)
    return value
