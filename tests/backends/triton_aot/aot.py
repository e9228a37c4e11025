"""What ptxas makes of each Triton kernel: registers, shared memory, spills. No GPU is needed.

`python tests/backends/triton_aot/aot.py` compiles every kernel for compute capability 8.0, 9.0 and 10.0 in fp32 and
bf16, prints a table, and fails where one spills; `… aot.py 90 bfloat16 swiglu maxnreg=32` for some architectures,
dtypes and ops, and with an option of Triton's.

Which kernels with which constants follows from cases.py: the ops run as they are, on CPU tensors, but what they would
launch is kept and then compiled as it would be for a GPU's tensors.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[2]))
from backends.cases import CASES, run_with_gradients
from llama_multimodal.ops import _dispatch
from llama_multimodal.ops.backends import triton as backend

ARCHS = ("80", "90", "100")
DTYPES = ("float32", "bfloat16")  # fp16 differs from bf16 in the type of its instructions only
ALLOWED = 16  # bytes of stack: ptxas spills a few registers where that lets more warps run side by side
MULTIPROCESSORS = 132  # an H100's: among how many the work is divided decides some constants
_run = JITFunction.run


@dataclass(frozen=True)
class Usage:
    """One kernel as some constants make it; stack: bytes of it, where registers go that are spilled."""

    file: str
    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int


@dataclass(frozen=True)
class Launch:
    kernel: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]


class Offline:
    """Stands in for a GPU's driver, which the compiler asks for what to compile."""

    def __init__(self, arch: str) -> None:
        self.arch = int(arch)

    def get_current_device(self) -> int:
        return self.arch  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def record(names: Sequence[str] = (), dtypes: Sequence[str] = DTYPES, **options: Any) -> list[Launch]:
    """What the cases of some ops, or of all, launch forward and backward; options: added to each launch."""
    launches: list[Launch] = []

    def keep(kernel: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launches.append(Launch(kernel, args, {**keywords, **options}))

    def call(op: str, reference: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        kernel = _dispatch._kernels.get((op, "triton"))
        return (kernel.function if kernel else reference)(*args, **keywords)

    modules = [importlib.import_module(f"{backend.__name__}.{name}") for name in backend._MODULES]
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", keep))
        patches.enter_context(mock.patch.object(_dispatch, "call", call))
        for module in modules:
            if hasattr(module, "multiprocessors"):
                patches.enter_context(mock.patch.object(module, "multiprocessors", lambda device: MULTIPROCESSORS))
        for case in CASES:
            if not names or case.op in names:
                for dtype in dtypes:
                    run_with_gradients(case, *case.arguments(getattr(torch, dtype), "cpu"))
    return launches


def compile_for(arch: str, launches: Sequence[Launch]) -> list[Usage]:
    """Each kernel with each set of constants and alignments once.

    Raises:
        RuntimeError: a compiler refused one.
    """
    triton.runtime.driver.set_active(Offline(arch))
    compiled = {}
    for launch in launches:
        kernel = _run(launch.kernel, *launch.args, grid=(1,), warmup=True, **launch.keywords)
        compiled[kernel.hash] = (launch, kernel)
    return [usage(arch, launch, kernel.asm["cubin"]) for launch, kernel in compiled.values()]


def usage(arch: str, launch: Launch, cubin: bytes) -> Usage:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", done.stdout))
    names = (name for name, value in launch.keywords.items() if name.isupper() and name not in ("SCALE", "UPCAST"))
    constants = ", ".join(f"{name}={_short(launch.keywords[name])}" for name in names)
    dtype = str(launch.args[0].dtype).removeprefix("torch.")
    name = f"{launch.kernel.__name__.strip('_')}<{dtype}, {constants}>"
    file = launch.kernel.__module__.rpartition(".")[2]
    return Usage(file, name, arch, int(found["REG"]), int(found["SHARED"]), int(found["STACK"]))


def _short(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def main(arguments: Sequence[str]) -> int:
    archs = [a for a in arguments if a.isdigit()] or ARCHS
    dtypes = [a for a in arguments if a in DTYPES] or DTYPES
    options = {name: int(value) for name, _, value in (a.partition("=") for a in arguments) if value}
    names = {case.op for case in CASES}.intersection(arguments)
    if unknown := {a for a in arguments if "=" not in a} - {*archs, *dtypes, *names}:
        sys.exit(f"no such architecture, dtype or op: {', '.join(sorted(unknown))}")
    launches = record(sorted(names), dtypes, **options)
    table: dict[tuple[str, str], dict[str, list[Usage]]] = {}
    for arch in archs:
        for found in compile_for(arch, launches):
            table.setdefault((found.file, found.kernel), {}).setdefault(arch, []).append(found)
    print("| file | kernel | " + " | ".join(f"sm_{arch}" for arch in archs) + " |")
    print("|---" * (len(archs) + 2) + "|")
    for (file, kernel), row in table.items():
        print(f"| {file} | `{kernel}` | {' | '.join(map(_cell, row.values()))} |")
    return any(u.stack > ALLOWED for row in table.values() for usages in row.values() for u in usages)


def _cell(usages: Sequence[Usage]) -> str:
    """The most that any variant takes: those of one name differ in what is known of strides and addresses."""
    registers, stack = max(u.registers for u in usages), max(u.stack for u in usages)
    return f"{registers}" + (f" + {stack} B stack" if stack else "")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        sys.exit(main(sys.argv[1:]))
