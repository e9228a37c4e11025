"""What a run says of its memory before it begins: the plan for each of its processes, and whether the device has it."""

from __future__ import annotations

import os

import torch

from ..errors import ConfigError
from ..planning import CONTEXT_GIB, MemoryPlan
from .launch import local_rank

_GIB = 2**30
_AT_LEAST = ("weights", "adapters", "optimizer", "averaged weights")
"""Parts that are there in every step, whatever it reads."""


def describe(made: MemoryPlan, processes: int, how: str) -> list[str]:
    """A plan in a few lines."""
    load = made.load
    each = f"each of {processes} processes ({how})" if processes > 1 else "one process"
    parts = ", ".join(f"{part.name} {part.at_peak / _GIB:.1f}" for part in made.parts if part.at_peak >= 0.05 * _GIB)
    reads = f"{load.rows} × {load.context} tokens"
    if load.images:
        reads += f" with {load.images // load.rows or 1} picture a row, of {load.tiles // load.images} tiles"
    learnt = f"{made.trained_parameters:,} parameters learn"
    learnt += f" of {made.parameters:,}" if made.options.train == "full" else f" beside {made.parameters:,}"
    return [
        f"memory plan, {each}: {made.total / _GIB:.2f} GiB at the peak, which is {made.peak}",
        f"  for micro-batches of {reads}; {learnt}",
        *([f"  in GiB: {parts}"] if parts else []),
    ]


def check(made: MemoryPlan, device: torch.device, relief: str) -> list[str]:
    """A warning where the plan is more than the device has.

    Raises:
        ConfigError: what every step needs, whatever it reads, is more than that.
    """
    there = usable(device)
    least = sum(made.part(name).at_peak for name in _AT_LEAST)
    if there is None or made.total <= there:
        return []
    if least > there:
        raise ConfigError(
            f"weights and optimizer alone take {least / _GIB:.1f} GiB, and {device} has {there / _GIB:.1f} GiB for each"
            f" process; {relief}"
        )
    return [
        f"warning: the plan is {made.total / _GIB:.1f} GiB and {device} has {there / _GIB:.1f} GiB for each process:"
        f" longer steps may not fit; {relief}"
    ]


def usable(device: torch.device) -> int | None:
    """Bytes that each process of this machine can take; None where nobody says."""
    if device.type == "cuda":
        index = device.index if device.index is not None else local_rank()
        return torch.cuda.get_device_properties(index).total_memory - int(CONTEXT_GIB * _GIB)
    if not hasattr(os, "sysconf"):
        return None
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return whole // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
