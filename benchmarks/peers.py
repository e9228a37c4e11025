"""What the benchmarks share: a synthetic checkpoint, its transformers twin, and fair measurement.

Set OMP_PROC_BIND=true when running any of them. Peers run in the same process, interleaved, but for llama.cpp
(peer_process.py).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from llama_multimodal.ops.linear import has_matrix_unit

Measured = dict[str, dict[str, float]]


def random_mllama(folder: Path, *, text_hidden: int, text_layers: int, vision_layers: int, tile: int) -> Path:
    """A random bf16 checkpoint in Hugging Face's layout, every gate open, written by transformers itself.

    As in every released checkpoint, a picture's unused tiles carry no embeddings.
    """
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    folder = folder / f"random-mllama-{text_hidden}-{text_layers}-{vision_layers}-{tile}"
    if (folder / "config.json").exists():
        return folder
    cross = list(range(3, text_layers, 5))
    config = MllamaConfig(
        vision_config={
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": vision_layers,
            "num_global_layers": 2,
            "attention_heads": 8,
            "image_size": tile,
            "max_num_tiles": 4,
            "intermediate_layers_indices": [1, 3, 5],
            "vision_output_dim": 512 * 4,
            "supported_aspect_ratios": [[h, w] for h in range(1, 5) for w in range(1, 5) if h * w <= 4],
        },
        text_config={
            "hidden_size": text_hidden,
            "intermediate_size": text_hidden * 7 // 2,
            "num_hidden_layers": text_layers,
            "num_attention_heads": text_hidden // 64,
            "num_key_value_heads": text_hidden // 256,
            "cross_attention_layers": cross,
            "vocab_size": 32000,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token_index=32000,
    )
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.5)
            elif "tile" in name and "embedding.weight" in name:
                tiles = parameter.view(parameter.shape[0], 4, -1)
                for ratio, (rows, columns) in enumerate(config.vision_config.supported_aspect_ratios, start=1):
                    tiles[ratio, rows * columns :] = 0.0
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


class PeakMemory:
    """Peak anonymous memory inside a `with` block above what was there before it, in MiB (Linux with glibc).

    Sampled every millisecond. The allocator keeps what was freed, so a second run of anything would need nothing more:
    inside the block it asks the system for every larger piece and gives it back at once, which is slow. The holes that
    earlier runs left in its heap are held for so long: a piece that fell into one would stay resident once freed, and
    the peak would grow by the holes it visits.
    """

    _TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's parameters
    _AT_ONCE, _AT_MOST, _SELDOM = 1 << 16, 1 << 25, 1 << 30  # bytes
    _IS_MMAPPED = 2  # a bit of the word before each piece, which holds its size

    def __enter__(self) -> PeakMemory:
        self.libc = ctypes.CDLL(None)
        self.libc.malloc.restype, self.libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        self.libc.free.restype, self.libc.free.argtypes = None, [ctypes.c_void_p]
        self.libc.mallopt(self._MMAP_THRESHOLD, self._AT_ONCE)
        self.libc.malloc_trim(0)
        self.holes = list(self._holes())
        self.before = self.peak = self._resident()
        self.ended = threading.Event()
        self.sampler = threading.Thread(target=self._sample)
        self.sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.sampler.join()
        self.extra = self.peak - self.before
        for hole in self.holes:
            self.libc.free(hole)
        # Once set, neither follows the program any more as it does by default: what comes next keeps what it frees.
        self.libc.mallopt(self._MMAP_THRESHOLD, self._AT_MOST)
        self.libc.mallopt(self._TRIM_THRESHOLD, self._SELDOM)

    def _holes(self) -> Iterator[int]:
        """Allocate every free piece of the heap that is large enough for a tensor, without touching its pages."""
        size = self._SELDOM
        while size >= self._AT_ONCE:
            place = self.libc.malloc(size)
            if place and not self._size_word(place) & self._IS_MMAPPED:
                yield place
            else:  # no hole of this size is left
                self.libc.free(place)
                size = size * 3 // 4

    @staticmethod
    def _size_word(place: int) -> int:
        return ctypes.c_size_t.from_address(place - ctypes.sizeof(ctypes.c_size_t)).value

    def _sample(self) -> None:
        while not self.ended.wait(0.001):
            self.peak = max(self.peak, self._resident())

    @staticmethod
    def _resident() -> float:
        # Not VmHWM: it counts file pages too, which the system takes and gives as it likes.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) / 1024
        raise RuntimeError("/proc/self/status has no RssAnon")


def timed(candidates: dict[str, Callable[[], Any]], repeats: int) -> Measured:
    """Each candidate in turn, so many times; median, fastest and slowest seconds, which a candidate may count itself
    and return as a float. Warm them up before."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            started = time.perf_counter()
            found = run()
            seconds[name].append(found if isinstance(found, float) else time.perf_counter() - started)
    return {
        name: {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times)}
        for name, times in seconds.items()
    }


def interleaved(candidates: dict[str, Callable[[], Any]], repeats: int) -> Measured:
    """Each candidate once to warm up and measure its memory, then in turn; median seconds and peak extra MiB."""
    memory: dict[str, float] = {}
    for name, run in candidates.items():
        run()
        with PeakMemory() as peak:
            run()
        memory[name] = peak.extra
    return {name: {**times, "extra_mib": memory[name]} for name, times in timed(candidates, repeats).items()}


def read_bandwidth(repeats: int = 5) -> float:
    """Bytes a second that torch's threads read from memory, at best: the sum of a tensor far larger than any cache."""
    numbers = torch.ones(1 << 28, dtype=torch.int64)
    numbers.sum()
    return numbers.nbytes / timed({"sum": numbers.sum}, repeats)["sum"]["fastest"]


def show(title: str, measured: Measured, ours: str = "ours") -> None:
    """Medians, and every peer's ratio to ours."""
    base = measured[ours]
    print(f"\n{title}")
    for name, row in measured.items():
        print(
            f"  {name:14s} {row['seconds']:9.3f} s  ({row['fastest']:.3f} to {row['slowest']:.3f})"
            f"  {row['extra_mib']:8.0f} MiB extra   {row['seconds'] / base['seconds']:5.2f} x our time"
        )


def write(name: str, results: dict[str, Any], folder: Path | None) -> None:
    """One JSON with what was measured, on what, with which versions and commit."""
    if folder is None:
        return
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "numpy")}
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability() + (" with AMX" if has_matrix_unit() else ""),
        "omp_proc_bind": os.environ.get("OMP_PROC_BIND"),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
    }
    (folder / f"{name}.json").write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


def _processor() -> str:
    """Its name, with the numbers that tell its generation where a virtual machine's name does not."""
    first, *_ = Path("/proc/cpuinfo").read_text().split("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    name, family, model = (fields.get(key, "unknown") for key in ("model name", "cpu family", "model"))
    return f"{name} (family {family}, model {model})"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the synthetic checkpoints")
    parser.add_argument("--output", type=Path, help="folder for the JSON result")
    return parser
