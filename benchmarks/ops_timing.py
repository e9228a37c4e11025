"""How benchmarks/ops.py measures: candidates in turn, each over enough copies of its input that no cache holds them.

On a GPU a candidate's calls over all copies are captured in a CUDA graph, so that what is timed is the device's work
and not Python; one that cannot be captured is timed call by call, and says so.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

UNCACHED = 256 << 20  # bytes that the copies take together: five times an H100's L2
COPIES = (2, 32)  # at least, at most

Call = Callable[[int], Any]
"""Runs one copy."""


class Timer:
    """Calls over all copies, as one piece of work that can be timed again and again."""

    def __init__(self, call: Call, copies: int, device: str) -> None:
        self.call, self.copies, self.device = call, copies, device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: Any = None
        if device == "cuda":
            self._capture()
        else:
            self._run()

    @property
    def captured(self) -> bool:
        return self.graph is not None

    def _run(self) -> list[Any]:
        return [self.call(i) for i in range(self.copies)]

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compilers and handles first
            for _ in range(2):
                self._run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.outputs = self._run()  # kept, or all calls would write to the same memory, which a cache holds
        except RuntimeError:
            self.outputs = None
            torch.cuda.synchronize()
            return
        self.graph = graph

    def start(self) -> Callable[[], float]:
        """Run once; the result gives the seconds of a call when it is asked for."""
        if self.device != "cuda":
            began = time.perf_counter()
            self._run()
            seconds = (time.perf_counter() - began) / self.copies
            return lambda: seconds
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._run()
        last.record()

        def seconds_of_a_call() -> float:
            last.synchronize()
            return first.elapsed_time(last) / 1e3 / self.copies

        return seconds_of_a_call


def copies_of(nbytes: int) -> int:
    return min(COPIES[1], max(COPIES[0], -(-UNCACHED // max(1, nbytes))))


def interleaved(timers: dict[str, Timer], repeats: int) -> dict[str, list[float]]:
    """Seconds a call of each candidate, all of them in turn, `repeats` times over."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(repeats):
        for name, ask in [(name, timer.start()) for name, timer in timers.items()]:
            seconds[name].append(ask())
    return seconds


def summary(times: list[float]) -> dict[str, float]:
    """Microseconds: the median, and what four of five runs lie above and below."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return {"p20": 1e6 * fifths[0], "median": 1e6 * statistics.median(times), "p80": 1e6 * fifths[-1]}


def copy(nbytes: int, copies: int, device: str) -> Timer:
    """A copy that moves as many bytes: half of them read, half written."""
    half = max(4, nbytes // 2 // 4 * 4)
    sources = torch.randn(copies, half // 4, device=device)
    targets = torch.empty_like(sources)
    return Timer(lambda i: targets[i].copy_(sources[i]), copies, device)


def about(device: str) -> dict[str, Any]:
    """What was measured on: device, versions, commit."""
    facts: dict[str, Any] = {"device": "cpu", "torch": torch.__version__, "commit": _output("git", "rev-parse", "HEAD")}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
        }
    for package in ("triton", "liger_kernel"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    return facts


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
