"""Compiles the kernels for the CPU, through the headers in `shim/`, into a library with the same launchers."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llama_multimodal.ops.backends import cuda

CSRC = Path(cuda.__file__).parent / "csrc"
SHIM = Path(__file__).parent / "shim"
# Vectors that are not aligned and indices past an array are told as a GPU's errors; see the end of fibers.cpp.
_FLAGS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-U_FORTIFY_SOURCE", f"-I{SHIM}"]
_CHECKS = ["-fsanitize=alignment,bounds"]


def why_not() -> str | None:
    """Why this machine cannot compile the kernels for the CPU, or None."""
    return None if shutil.which("g++") else "there is no g++ to compile the kernels for the CPU"


def build(folder: Path, sources: Iterable[Path] | None = None, reuse: Iterable[Path] = ()) -> Path:
    """Compile .cu files into one library in `folder`: all of the package's, or some with object files of before.

    Raises:
        RuntimeError: the compiler refused something; the message is its own.
    """
    sources = [*sorted(CSRC.glob("*.cu")), SHIM / "fibers.cpp"] if sources is None else list(sources)
    with ThreadPoolExecutor(2) as pool:
        objects = [*pool.map(lambda source: _compile(source, folder), sources), *reuse]
    library = folder / "libllama_mm_shim.so"
    _run(["g++", "-shared", "-o", str(library), *map(str, objects)])
    return library


def _compile(source: Path, folder: Path) -> Path:
    out = folder / f"{source.stem}.o"
    checks = _CHECKS if source.suffix == ".cu" else []
    _run(["g++", "-x", "c++", *_FLAGS, *checks, "-c", str(source), "-o", str(out)])
    return out


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
