"""Write the tables of docs/kernels.md: which backend has which kernel, what each op must move, what the compilers made,
and what benchmarks/results says about CPUs.

    python docs/make_kernels.py

Needs triton for the first table, and nvcc for the last two; it measures nothing, and no GPU is needed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]
from backends.cuda import ptxas  # noqa: E402
from ops_rows import ROWS, Row  # noqa: E402

from llama_multimodal.ops import BACKENDS, _dispatch  # noqa: E402

PAGE = Path(__file__).parent / "kernels.md"
ARCH = "90"


@dataclass(frozen=True)
class Device:
    """Bytes a second, and operations a second in matrix products by dtype."""

    name: str
    bandwidth: float
    peak: dict[torch.dtype, float]


DEVICES = (
    Device("H100, data sheet", 3.35e12, {torch.bfloat16: 989.4e12, torch.float32: 66.9e12}),
    Device("H100, as measured", 3.0e12, {torch.bfloat16: 790e12, torch.float32: 66.9e12}),
    Device("RTX 4090, data sheet", 1.008e12, {torch.bfloat16: 165.2e12, torch.float32: 82.6e12}),
)


def kernels() -> str:
    """Op by backend, from what the backends register."""
    for backend in BACKENDS[:-1]:
        package = importlib.import_module(f"llama_multimodal.ops.backends.{backend}")
        for name in getattr(package, "_MODULES", ()):
            importlib.import_module(f"{package.__name__}.{name}")
        _dispatch.why_missing(backend)  # registers those of a backend that has no such list
    lines = ["| op | " + " | ".join(BACKENDS[:-1]) + " |", "|---" * len(BACKENDS) + "|"]
    for op in sorted({op for op, _ in _dispatch._kernels}):
        found = (_dispatch._kernels.get((op, backend)) for backend in BACKENDS[:-1])
        cells = ("–" if k is None else "forward and backward" if k.differentiable else "forward" for k in found)
        lines.append(f"| `{op}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def floors() -> str:
    heads = " | ".join(device.name for device in DEVICES)
    lines = [*map(_rates, DEVICES), ""]
    lines += [f"| op | size | MB | million operations | {heads} |", "|---" * (4 + len(DEVICES)) + "|"]
    return "\n".join([*lines, *map(_floor, ROWS)])


def _rates(device: Device) -> str:
    half, full = (device.peak[dtype] / 1e12 for dtype in (torch.bfloat16, torch.float32))
    return f"* {device.name}: {device.bandwidth / 1e12:g} TB/s; {half:g} TFLOP/s in bf16, {full:g} in fp32"


def _floor(row: Row) -> str:
    times = (row.cost.floor(device.bandwidth, device.peak[row.dtype]) * 1e6 for device in DEVICES)
    cells = " | ".join(f"{time:.1f} µs" for time in times)
    return f"| `{row.op}` | {row.title} | {row.cost.bytes / 1e6:.1f} | {row.cost.operations / 1e6:.0f} | {cells} |"


# --- what nvcc makes of the .cu files --------------------------------------------------------------------------------


def sources() -> list[Path]:
    return [file for file in sorted(ptxas.CSRC.glob("*.cu")) if file.stem != "library"]  # which computes nothing


def registers() -> str:
    """A line a kernel, its variants for dtypes and sizes together."""
    lines = ["| file | kernel | variants | registers | shared memory | stack |", "|---" * 6 + "|"]
    for file in sources():
        kinds: dict[str, list] = {}
        for usage in (usage for usage in ptxas.usages(file) if usage.arch == ARCH):
            kinds.setdefault(usage.kernel.split("<")[0], []).append(usage)
        for kind, usages in kinds.items():
            used = sorted(u.registers for u in usages)
            shared, stack = max(u.shared for u in usages), max(u.stack for u in usages)
            lines.append(f"| {file.stem} | `{kind}` | {len(usages)} | {_span(used)} | {shared} B | {stack} B |")
    return "\n".join(lines)


def _span(values: list[int]) -> str:
    return f"{values[0]}" if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def instructions() -> str:
    """How wide the loads and stores are of each kernel's variant that has most of the widest, and what else it does."""
    lines = [
        "| file | kernel | loads from memory | stores | fp32 | tensor core | exp, rsqrt, … | all |",
        "|---" * 8 + "|",
    ]
    for file in sources():
        kinds: dict[str, tuple[str, list[str]]] = {}
        for name, code in disassemble(file).items():
            kind = name.split("<")[0]
            if kind not in kinds or _wide(code) > _wide(kinds[kind][1]):
                kinds[kind] = (name, code)
        for name, code in kinds.values():
            moved = [_widths(code, what) for what in (r"LDG(?:STS)?\.", r"STG\.")]
            counts = [sum(bool(re.match(what, line)) for line in code) for what in ("F(FMA|ADD|MUL)", ".MMA", "MUFU")]
            cells = " | ".join([*moved, *map(str, counts), str(len(code))])
            lines.append(f"| {file.stem} | `{name}` | {cells} |")
    return "\n".join(lines)


def _wide(code: list[str]) -> int:
    return sum(".128" in line for line in code if line.startswith(("LDG", "STG")))


def _widths(code: list[str], what: str) -> str:
    """ "4 x 128 bits, 1 x 32 bits" """
    found: Counter[int] = Counter()
    for line in code:
        if re.match(what, line):
            width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", line.split()[0])
            found[int(re.sub(r"\D", "", width.group(1))) if width else 32] += 1
    return ", ".join(f"{count} x {width} bits" for width, count in sorted(found.items(), reverse=True)) or "–"


def disassemble(file: Path) -> dict[str, list[str]]:
    """Each kernel's instructions for ARCH, without what predicates them."""
    found: dict[str, list[str]] = {}
    for part in ptxas.cuobjdump("-sass", "-arch", f"sm_{ARCH}", ptxas.compiled(file)).split("Function : ")[1:]:
        (name,) = ptxas.demangled([part.split("\n")[0].strip()])
        code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", part)
        found[name] = [line for line in code if not line.startswith("NOP")]
    return found


def generation(result: dict[str, Any]) -> str:
    """Tokens a second of benchmarks/generate.py, and ratios to its peers of the same run."""
    model = result["results"].get("model", "the shape of Llama 3.2 1B").rpartition("/")[2]
    decode, prefill = (result["results"][f"{kind}_tokens_per_second"] for kind in ("decode", "prefill"))
    peers = {"bf16": "llama.cpp BF16", "int8": "llama.cpp Q8_0", "int4": "llama.cpp Q4_0"}
    lines = [
        "| | decoding | of transformers | of llama.cpp | prefill | of transformers | of llama.cpp |",
        "|---" * 7 + "|",
    ]
    for name in decode:
        cells = []
        for rates, digits in ((decode, 1), (prefill, 0)):
            peer = next((rates[p] for format, p in peers.items() if name.startswith(format)), None)
            cells += [f"{rates[name]:.{digits}f}", f"{rates[name] / rates['transformers bf16']:.2f} x"]
            cells.append("–" if peer is None else f"{rates[name] / peer:.2f} x")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([f"{model}: {_where(result)}", "", *lines])


def matrices(result: dict[str, Any]) -> str:
    """Milliseconds of benchmarks/linear.py, by rows of x."""
    rows = {name: row for name, row in result["results"].items() if name.endswith(" rows")}
    heads = [*rows, "memory read at 1 rows"]
    lines = [f"| | {' | '.join(heads)} |".replace("1 rows", "1 row"), "|---" * (len(heads) + 1) + "|"]
    one = rows["1 rows"]
    for name in sorted(one):
        times = (
            f"{row[name]['seconds'] * 1e3:.{3 if row[name]['seconds'] < 0.01 else 1}f} ms" for row in rows.values()
        )
        lines.append(f"| {name} | {' | '.join(times)} | {one[name]['of_memory'] / 1e9:.1f} GB/s |")
    return "\n".join([_where(result), "", *lines])


def on_each_machine(table: Callable[[dict[str, Any]], str], name: str) -> str:
    """The tables of Intel machines that show AMX and that do not, of AMD's Zen 5, and of other AMD machines with
    AVX-512 and with AVX2, those that are there."""
    names = (f"{name}{machine}" for machine in ("_amx", "", "_zen5", "_amd", "_avx2"))
    files = (ROOT / "benchmarks/results" / f"{file}.json" for file in names)
    return "\n\n".join(table(json.loads(file.read_text(encoding="utf-8"))) for file in files if file.exists())


def _where(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    machine = f"{result['device']}, {result['threads']} threads, {result['capability']}"
    return f"{machine}; {versions}; commit {result['commit'][:7]}."


def replace(marker: str, text: str) -> None:
    """Put `text` between the marker's two comments."""
    pattern = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
    old = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", old, flags=re.S), encoding="utf-8")


def main() -> None:
    replace("kernels", kernels())
    replace("floors", floors())
    replace("generation", "\n\n".join(on_each_machine(generation, f"generate{model}") for model in ("", "_smollm2")))
    replace("matrices", on_each_machine(matrices, "linear"))
    if shutil.which("nvcc"):
        replace("registers", registers())
        replace("instructions", instructions())


if __name__ == "__main__":
    main()
