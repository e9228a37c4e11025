"""Builds the native libraries beside the package; what the package is stands in pyproject.toml.

`pip install .` and `pip install -e .` build what this machine can: the CUDA kernels where there is an nvcc, the CPU
kernels where there is a C++ compiler. Neither needs torch, and neither can make the installation fail: what was built,
or why not, is in a report beside each library, and `llama-mm doctor` shows it.

    python setup.py build_native --inplace     builds into the source tree, without installing

    NO_CUDA=1              leaves the CUDA kernels out
    CUDA_HOME              where nvcc is; otherwise it is looked for on PATH and in /usr/local/cuda
    TORCH_CUDA_ARCH_LIST   which GPUs to build for, "8.6;9.0+PTX"
    CXX                    the C++ compiler of the CPU kernels
    MAX_JOBS               files compiled side by side; as many as there are cores by default
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
BACKENDS = Path("llama_multimodal/ops/backends")
OBJECTS = ROOT / "build" / "native"

CUDA_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0+PTX")
ARCH_NAMES = {
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
NVCC_FLAGS = ("-O3", "-std=c++17", "--threads", "0", "-Xcompiler", "-fPIC")  # the architectures side by side
CXX_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp")
# What a file's ending allows it to use; it runs only where the processor has it.
X86 = {
    "avx512": (
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16", "-mavx2", "-mfma",
        "-mf16c",
    ),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
}  # fmt: skip
X86["amx"] = X86["avx512"]  # and assembly
ARM = {"neon": ()}  # every 64-bit ARM has it


class NotBuilt(Exception):
    """Why a library cannot be built here, in a line for the report."""


# --- compiling -------------------------------------------------------------------------------------------------------


def compile_and_link(
    sources: list[tuple[Path, list[str]]], compiler: list[str], link: list[str], library: Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """Build a library from files, each with its own flags, unless it is there and up to date; its report.

    Objects are kept, under a name made of all that they depend on: sources, headers, flags and the compiler.
    """
    started = time.monotonic()
    headers = sorted(p for source, _ in sources for p in source.parent.iterdir() if p.suffix in (".h", ".cuh"))
    common = b"".join(header.read_bytes() for header in dict.fromkeys(headers)) + repr((compiler, facts)).encode()
    objects = {}
    for source, flags in sources:
        digest = hashlib.sha256(common + repr(flags).encode() + source.read_bytes()).hexdigest()[:20]
        objects[source] = OBJECTS / f"{library.stem}-{source.stem}-{digest}.o"
    fingerprint = hashlib.sha256(repr((sorted(o.name for o in objects.values()), link)).encode()).hexdigest()[:20]
    if library.exists() and read_report(library).get("fingerprint") == fingerprint:
        return read_report(library)

    def compile_one(item: tuple[Path, list[str]]) -> None:
        source, flags = item
        out, log = objects[source], objects[source].with_suffix(".log")
        if not (out.exists() and log.exists()):
            fresh = out.with_suffix(f".{os.getpid()}.o")
            log.write_text(run([*compiler, *flags, "-c", str(source), "-o", str(fresh)], source.name), encoding="utf-8")
            fresh.replace(out)

    OBJECTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(compile_one, sources))
    for old in OBJECTS.glob(f"{library.stem}-*.o"):
        if old not in objects.values():
            old.unlink()
            old.with_suffix(".log").unlink(missing_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    fresh = library.with_suffix(".new")
    run([*link, "-o", str(fresh), *map(str, objects.values())], library.name)
    fresh.replace(library)  # a process that has the old one open keeps it
    seconds = round(time.monotonic() - started, 1)
    said = "\n".join(out.with_suffix(".log").read_text(encoding="utf-8") for out in objects.values())
    warnings = [line for line in said.splitlines() if "warning" in line.lower()]
    return {"built": True, **facts, "seconds": seconds, "warnings": warnings, "fingerprint": fingerprint}


def run(command: list[str], what: str) -> str:
    """A program's output; what it says of the first error becomes the reason."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise NotBuilt(f"{command[0]} cannot be started ({error.strerror})") from error
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")
        raise NotBuilt(f"{Path(command[0]).name} failed on {what}: {first[:300]}")
    return done.stdout + done.stderr


def read_report(library: Path) -> dict[str, Any]:
    try:
        return json.loads(library.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


# --- the CUDA kernels ------------------------------------------------------------------------------------------------


def build_cuda(sources: Path, library: Path, env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    if env.get("NO_CUDA", "0") not in ("", "0"):
        raise NotBuilt("NO_CUDA is set")
    nvcc = find_nvcc(env)
    version = re.search(r"V([\d.]+)", run([nvcc, "--version"], "--version"))
    known = re.findall(r"compute_(\w+)", run([nvcc, "--list-gpu-arch"], "--list-gpu-arch"))
    asked = env.get("TORCH_CUDA_ARCH_LIST")
    archs = parse_archs(asked) if asked else [a for a in parse_archs(";".join(CUDA_ARCHS)) if a[1] in known]
    if not asked and not any(kind == "compute" for kind, _ in archs):
        archs.append(("compute", archs[-1][1]))  # an older nvcc, which does not know the last of the list
    flags = [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind, number in archs]
    facts = {
        "compiler": f"nvcc {version.group(1) if version else 'of an unknown version'}",
        "archs": [f"{kind}_{number}" for kind, number in archs],
    }
    files = [(file, flags) for file in sorted(sources.glob("*.cu"))]
    if not files:
        raise NotBuilt("there are no sources")
    return compile_and_link(files, [nvcc, *NVCC_FLAGS], [nvcc, "-shared", "-cudart", "static"], library, facts)


def find_nvcc(env: Mapping[str, str]) -> str:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := env.get(variable):
            nvcc = Path(home) / "bin" / "nvcc"
            if not nvcc.exists():
                raise NotBuilt(f"there is no {nvcc}, where {variable} points")
            return str(nvcc)
    nvcc = shutil.which("nvcc", path=env.get("PATH")) or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise NotBuilt("there is no nvcc; install the CUDA toolkit, or set CUDA_HOME to where it is")
    return nvcc


def parse_archs(text: str) -> list[tuple[str, str]]:
    """("sm", "86") for "8.6", and ("compute", "86") behind it for "8.6+PTX"; names mean what they mean to torch."""
    archs: list[tuple[str, str]] = []
    for entry in re.split(r"[;,\s]+", text.strip()):
        if entry in ARCH_NAMES:
            archs += parse_archs(ARCH_NAMES[entry])
            continue
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match is None:
            raise NotBuilt(f'TORCH_CUDA_ARCH_LIST holds "{entry}"; it takes what "8.6;9.0+PTX" shows')
        number = match.group(1) + match.group(2)
        archs += [("sm", number), ("compute", number)] if match.group(3) else [("sm", number)]
    return list(dict.fromkeys(archs))


# --- the CPU kernels -------------------------------------------------------------------------------------------------


def build_cpu(sources: Path, library: Path, env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    names = [env["CXX"]] if env.get("CXX") else ["g++", "c++", "clang++"]
    compiler = next((found for name in names if (found := shutil.which(name, path=env.get("PATH")))), None)
    if compiler is None:
        raise NotBuilt(f"there is no C++ compiler ({', '.join(names)})")
    version = run([compiler, "--version"], "--version").splitlines()[0]
    machine = platform.machine()
    files = [(file, flags) for file in sorted(sources.glob("*.cpp")) if (flags := cpu_flags(file.stem, machine))]
    if not assembles(compiler, "tilerelease"):  # of binutils before 2.36: the rest of the library does without
        files = [(file, [*flags, "-DLLAMA_MM_NO_AMX"]) for file, flags in files if not file.stem.endswith("_amx")]
    if not files:
        raise NotBuilt("there are no sources")
    facts = {
        "compiler": version,
        "archs": sorted({ending for file, _ in files if (ending := file.stem.rpartition("_")[2]) in X86}),
    }
    # libgomp.so.1 is not named by a path: the process has torch's loaded by then, and there must be one only.
    return compile_and_link(files, [compiler, *CXX_FLAGS], [compiler, "-shared", "-fopenmp"], library, facts)


def assembles(compiler: str, instruction: str) -> bool:
    """Whether the compiler's assembler knows an instruction, of this machine's kind."""
    command = [compiler, "-x", "c++", "-c", "-", "-o", os.devnull]
    source = f'void f() {{ asm volatile("{instruction}"); }}'
    return subprocess.run(command, input=source, capture_output=True, text=True, check=False).returncode == 0


def cpu_flags(stem: str, machine: str) -> list[str] | None:
    """A file's flags besides the common ones, by its name's ending; None: not for this kind of machine."""
    ending = stem.rpartition("_")[2]
    here = X86 if machine.lower() in ("x86_64", "amd64") else ARM
    if ending in X86 or ending in ARM:
        return ["-DNDEBUG", *here[ending]] if ending in here else None
    return ["-DNDEBUG"]


# --- setuptools ------------------------------------------------------------------------------------------------------

LIBRARIES: dict[str, Callable[[Path, Path], dict[str, Any]]] = {"cuda": build_cuda, "cpu": build_cpu}


def build_all(package_root: Path) -> None:
    """Build every library into the package under `package_root`, with a report beside it. Raises nothing."""
    for backend, build_one in LIBRARIES.items():
        library = package_root / BACKENDS / backend / f"libllama_mm_{backend}.so"
        try:
            report = build_one(ROOT / "src" / BACKENDS / backend / "csrc", library)
        except Exception as error:  # an installation without kernels is worth more than none
            why = str(error) if isinstance(error, NotBuilt) else f"{type(error).__name__}: {error}"
            report = {"built": False, "why": why}
            print(f"warning: the {backend} kernels are not built: {why}", file=sys.stderr)
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            if not report["built"]:
                library.unlink(missing_ok=True)  # an old one, of other sources
            library.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            print(f"warning: no build report for the {backend} kernels: {error}", file=sys.stderr)


class BuildNative(Command):
    """A step of `build`: into the wheel, or into the source tree for an editable installation."""

    description = "build the native libraries"
    user_options = [("inplace", "i", "into the source tree")]  # noqa: RUF012
    boolean_options = ["inplace"]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.inplace = self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        assert self.build_lib is not None
        build_all(ROOT / "src" if self.inplace or self.editable_mode else Path(self.build_lib))

    def get_source_files(self) -> list[str]:
        return [str(p.relative_to(ROOT)) for p in sorted((ROOT / "src" / BACKENDS).glob("*/csrc/*"))]

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]  # noqa: RUF012


class Platform(Distribution):
    """Belongs to one platform, though it has no extension modules."""

    def has_ext_modules(self) -> bool:
        return True


class Wheel(bdist_wheel):
    """The libraries know neither Python nor torch: one wheel for every version of both."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(distclass=Platform, cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel})
