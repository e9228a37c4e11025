"""What nvcc made of each kernel: registers, shared memory, spills.

`python tests/backends/cuda/ptxas.py` prints a table of every kernel for every architecture, and fails where one spills;
`… ptxas.py rms_norm 90` of some files and some architectures.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[3]
CSRC = ROOT / "src/llama_multimodal/ops/backends/cuda/csrc"
LIBRARY = "libllama_mm_cuda.so"
ARCHS = ("75", "80", "86", "89", "90", "100")


@dataclass(frozen=True)
class Usage:
    """One kernel on one architecture; stack: bytes of memory for what found no register."""

    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int


@functools.cache
def build() -> dict[str, Any]:
    """Compile every .cu file for every architecture as an installation does, whose objects are taken where they are of
    the same sources; the build's report.

    Raises:
        NotBuilt: nvcc refused one.
    """
    env = {name: value for name, value in os.environ.items() if name not in ("NO_CUDA", "TORCH_CUDA_ARCH_LIST")}
    with tempfile.TemporaryDirectory() as folder:
        return project_setup().build_cuda(CSRC, Path(folder) / LIBRARY, env)


def project_setup() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def known_archs() -> list[str]:
    """Those of ARCHS that this nvcc compiles for: an old one does not know the newest."""
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in ARCHS if f"compute_{arch}" in listed]


def compiled(source: Path) -> Path:
    """What became of a .cu file: an object with the code for every architecture."""
    build()
    (found,) = (ROOT / "build/native").glob(f"{Path(LIBRARY).stem}-{source.stem}-*.o")
    return found


def usages(source: Path) -> list[Usage]:
    """Of each of a file's kernels on each architecture."""
    return parse(cuobjdump("-res-usage", compiled(source)))


def parse(text: str) -> list[Usage]:
    """cuobjdump's report."""
    found: list[tuple[str, ...]] = []
    for part in text.split("\narch = sm_")[1:]:
        arch = part.split("\n", 1)[0]
        kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", part)
        found += [(arch, *kernel) for kernel in kernels]
    names = demangled([name for _, name, *_ in found])
    return [
        Usage(name, arch, int(registers), int(shared), int(stack) + int(local))
        for name, (arch, _, registers, stack, shared, local) in zip(names, found, strict=True)
    ]


def demangled(symbols: Sequence[str]) -> list[str]:
    """`void (anonymous namespace)::forward<__half, 8, 2>(__half const*, …)` → `forward<half, 8, 2>`"""
    text = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    shorter = re.sub(r"\(anonymous namespace\)::|^void |__nv_|__(?=half)", "", text, flags=re.MULTILINE)
    return [line.split("(")[0].replace("bfloat16", "bf16") for line in shorter.splitlines()]


def cuobjdump(*arguments: str | Path) -> str:
    """What CUDA's tool says, or the one in Triton's package."""
    tool = _tool()
    assert tool is not None, why_not()
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _tool() -> str | None:
    if tool := shutil.which("cuobjdump"):
        return tool
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    return shutil.which(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")


def why_not() -> str | None:
    if shutil.which("nvcc") is None:
        return "there is no nvcc"
    return "there is no cuobjdump: neither CUDA's nor Triton's" if _tool() is None else None


def main(arguments: Sequence[str]) -> int:
    archs = [a for a in arguments if a.isdigit()] or known_archs()
    names = [a for a in arguments if not a.isdigit()]
    files = [file for file in sorted(CSRC.glob("*.cu")) if not names or file.stem in names]
    table: dict[tuple[str, str], dict[str, Usage]] = {}
    for file in files:
        for usage in usages(file):
            table.setdefault((file.stem, usage.kernel), {})[usage.arch] = usage
    print("| file | kernel | " + " | ".join(f"sm_{arch}" for arch in archs) + " | shared |")
    print("|---" * (len(archs) + 3) + "|")
    for (file_name, kernel), row in table.items():
        cells = [f"{row[a].registers}" + (f" + {row[a].stack} B of stack" if row[a].stack else "") for a in archs]
        print(f"| {file_name} | `{kernel}` | {' | '.join(cells)} | {max(row[a].shared for a in archs)} B |")
    return any(row[a].stack for row in table.values() for a in archs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
