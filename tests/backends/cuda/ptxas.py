"""What nvcc says of each kernel: registers, shared memory, spills.

`python tests/backends/cuda/ptxas.py` prints a table of every kernel for every architecture, and fails where one spills;
`… ptxas.py rms_norm 90` of some files and some architectures.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parents[3] / "src/llama_multimodal/ops/backends/cuda/csrc"
ARCHS = ("75", "80", "86", "89", "90", "100")


@dataclass(frozen=True)
class Usage:
    """One kernel on one architecture; spilled: bytes of registers that went to memory."""

    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    spilled: int


def compile_file(source: Path, arch: str) -> list[Usage]:
    """Compile a .cu file for one architecture.

    Raises:
        RuntimeError: nvcc refused it, or warned.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-O3", "-std=c++17", "-cubin", "-Xptxas", "-v", f"-arch=sm_{arch}", str(source)]
        done = subprocess.run([*command, "-o", f"{folder}/out.cubin"], capture_output=True, text=True)
    if done.returncode or "warning" in done.stderr:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return parse(done.stderr, arch)


def parse(text: str, arch: str) -> list[Usage]:
    """ptxas' report, demangled."""
    found = []
    for part in text.split("Compiling entry function '")[1:]:
        stack, stores, loads = (
            int(n) for n in re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", part)[0]
        )
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.findall(r"Used (\d+) registers", part)[0])
        name = part.split("'")[0]
        found.append(Usage(name, arch, registers, int(shared.group(1)) if shared else 0, stack, stores + loads))
    names = subprocess.run(["c++filt", *(u.kernel for u in found)], capture_output=True, text=True).stdout.splitlines()
    return [
        Usage(_short(name), u.arch, u.registers, u.shared, u.stack, u.spilled)
        for name, u in zip(names, found, strict=True)
    ]


def _short(name: str) -> str:
    """`void (anonymous namespace)::forward<__half, 8, 2>(__half const*, …)` → `forward<half, 8, 2>`"""
    name = re.sub(r"\(anonymous namespace\)::|^void |__nv_|__(?=half)", "", name)
    return name.split("(")[0].replace("bfloat16", "bf16")


def why_not() -> str | None:
    return None if shutil.which("nvcc") else "there is no nvcc"


def main(arguments: Sequence[str]) -> int:
    archs = [a for a in arguments if a.isdigit()] or list(ARCHS)
    names = [a for a in arguments if not a.isdigit()]
    files = [file for file in sorted(CSRC.glob("*.cu")) if not names or file.stem in names]
    jobs = [(file, arch) for file in files for arch in archs]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: compile_file(*job), jobs))
    table: dict[tuple[str, str], dict[str, Usage]] = {}
    for (file, arch), usages in zip(jobs, results):
        for usage in usages:
            table.setdefault((file.stem, usage.kernel), {})[arch] = usage
    print("| file | kernel | " + " | ".join(f"sm_{arch}" for arch in archs) + " | shared |")
    print("|---" * (len(archs) + 3) + "|")
    for (file_name, kernel), row in table.items():
        cells = [f"{u.registers}" + (f" + {u.spilled} B spilled" if u.spilled else "") for u in row.values()]
        print(f"| {file_name} | `{kernel}` | {' | '.join(cells)} | {max(u.shared for u in row.values())} B |")
    return any(u.spilled for row in table.values() for u in row.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
