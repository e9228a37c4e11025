"""Matrix products of activations and weights."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch

# From this many rows on, widening a weight once costs less than multiplying in an emulated half precision.
_MIN_ROWS_TO_WIDEN = 16
_ROWS_AT_ONCE = 512  # that are widened together: their fp32 copies stay small and in the cache


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x · weightᵀ + bias`; x: [..., K], weight: [N, K], bias: [N] → [..., N] in x's dtype."""
    return _dispatch.call("linear", _torch, x, weight, bias)


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if widens(x):
        return _widened(x, weight.float(), None if bias is None else bias.float())
    return F.linear(x, weight, bias)


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled():
        return F.linear(x.float(), weight, bias).to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    for some, place in zip(rows.split(_ROWS_AT_ONCE), out.split(_ROWS_AT_ONCE), strict=True):
        place.copy_(F.linear(some.float(), weight, bias))
    return out.view(*x.shape[:-1], weight.shape[0])


def widens(x: Tensor) -> bool:
    """Whether a product with x runs in fp32 and is rounded once at the end.

    A CPU without bf16 or fp16 instructions emulates them at about a tenth of its fp32 rate. Either way the sum is
    accumulated in fp32, so the result differs by the order of the sum only.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return not cpu_multiplies(x.dtype) and x.numel() // max(1, x.shape[-1]) >= _MIN_ROWS_TO_WIDEN


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix instructions for a half-precision dtype."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported() and _cpu_flag("avx512_bf16", "amx_bf16", "bf16")
    return torch.ops.mkldnn._is_mkldnn_fp16_supported() and _cpu_flag("avx512_fp16", "amx_fp16", "asimdhp")


def _cpu_flag(*names: str) -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.lower().startswith(("flags", "features"))), "")
    except OSError:
        return True  # not Linux: trust torch's own choice
    return any(name in flags.split() for name in names)
