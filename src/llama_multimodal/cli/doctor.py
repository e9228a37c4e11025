"""`llama-mm doctor`: what this machine has, what is missing, why, and how to mend it."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import typer

from .. import __version__
from ..zoo.registry import EMBEDDED_FOLDER, EMBEDDED_MEND, EMBEDDED_MISSING, checkpoints
from . import common
from .zoo import size

_REQUIRED = ("torch", "numpy", "pillow", "safetensors", "tokenizers", "jinja2", "huggingface_hub", "typer", "rich")
_EXTRAS = {
    "train": ("pyyaml", "matplotlib"),
    "gguf": ("gguf",),
    "bench": ("transformers",),
    "dev": ("pytest", "hypothesis", "ruff", "mypy", "tiktoken", "transformers"),
}
_FOR = {
    "train": "llama-mm train and llama-mm eval", "gguf": "GGUF files", "bench": "benchmarks", "dev": "the tests",
}  # fmt: skip
# What makes a matrix product fast, as the kernel names it on x86 and on ARM.
_CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16",
    "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
_BIG_DOWNLOAD = 25 * 2**30  # bytes: what the smallest downloadable checkpoint needs


def doctor(as_json: common.AsJson = False) -> None:
    """Show versions, devices, backends, and what is missing and why."""
    bound = common.bind_threads()
    report = examine(bound)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    if any(problem["severity"] == "error" for problem in report["problems"]):
        raise typer.Exit(1)


def examine(threads_bound: bool | None) -> dict[str, Any]:
    """Everything doctor knows, as plain values."""
    problems: list[dict[str, str]] = []

    def problem(what: str, mend: str, severity: str = "note") -> None:
        problems.append({"severity": severity, "what": what, "mend": mend})

    report: dict[str, Any] = {
        "versions": {"llama_multimodal": __version__, "python": platform.python_version(), **_versions(_REQUIRED)},
        "extras": {extra: _versions(packages) for extra, packages in _EXTRAS.items()},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(),
    }
    for package, version in report["versions"].items():
        if version is None:
            problem(f"{package} is not installed", "install the project again: pip install -e .", "error")
    for extra, packages in report["extras"].items():
        if missing := [package for package, version in packages.items() if version is None]:
            problem(f"{_FOR[extra]}: {', '.join(missing)} not installed", f'pip install -e ".[{extra}]"')
    try:
        import torch
    except Exception as error:  # a broken build raises OSError, ImportError, …; that is what doctor is to find out
        problem(f"torch cannot be imported: {error}", "install torch again, from pytorch.org for this machine", "error")
        report |= {"threads": None, "devices": [], "backends": None}
    else:
        report["threads"] = _threads(torch, threads_bound)
        report["devices"] = _devices(torch)
        report["backends"] = _backends("cuda" if torch.cuda.is_available() else "cpu")
        if not any(device["name"].startswith(("cuda", "mps")) for device in report["devices"]):
            cpu_only = torch.version.cuda is None and torch.version.hip is None
            why = (
                "this torch was built for CPUs only" if cpu_only else "torch finds none (driver, CUDA_VISIBLE_DEVICES)"
            )
            problem(f"no GPU: {why}", "fine for tiny; for the large models use a machine with a GPU, or be patient")
        for device in report["devices"]:
            if device["name"] == "cpu" and device["memory_bytes"] and device["memory_bytes"] < _BIG_DOWNLOAD:
                problem(
                    f"{size(device['memory_bytes'])} of memory: the 11B model in bf16 does not fit on the CPU",
                    "use tiny, or a larger machine",
                )
    report["hub"] = _hub()
    if not report["hub"]["token"]:
        problem("no Hugging Face token: gated models cannot be downloaded", "accept the licence, then: hf auth login")
    free = report["hub"]["free_bytes"]
    if free is not None and free < _BIG_DOWNLOAD:
        problem(
            f"{size(free)} free in the download cache, less than the smallest large model needs",
            "free some space, or set HF_HOME to a folder on a larger disk",
        )
    embedded = next(checkpoint for checkpoint in checkpoints() if checkpoint.embedded)
    report["embedded_model"] = {"name": embedded.name, "available": embedded.available, "folder": str(EMBEDDED_FOLDER)}
    if not embedded.available:
        problem(EMBEDDED_MISSING, EMBEDDED_MEND, "warning")
    report["problems"] = problems
    return report


def _versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    from importlib import metadata  # reads e-mail headers; no other command waits for that

    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    except OSError:
        pass
    return {"model": model, "cores": common.num_cores(), "features": [flag for flag in _CPU_FLAGS if flag in flags]}


def _threads(torch: Any, bound: bool | None) -> dict[str, Any]:
    return {
        "torch": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "OMP_PROC_BIND": os.environ.get("OMP_PROC_BIND"),
        "bound_by": {True: "llama-mm", False: "nobody", None: "the environment"}[bound],
    }


def _devices(torch: Any) -> list[dict[str, Any]]:
    total = None
    if hasattr(os, "sysconf"):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    devices = [{"name": "cpu", "what": _cpu()["model"], "memory_bytes": total}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            devices.append({"name": f"cuda:{index}", "what": facts.name, "memory_bytes": facts.total_memory})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps", "what": "Apple GPU", "memory_bytes": total})
    return devices


def _backends(device: str) -> dict[str, Any]:
    """For each op, what each backend is to it for tensors on `device`: in use, available, left to torch, or why not."""
    from .. import ops
    from ..ops import _dispatch
    from ..ops.backends.native import build_report

    missing = {name: _dispatch.why_missing(name) for name in ops.BACKENDS}
    order: tuple[str, ...] = _dispatch._AUTOMATIC.get(device, ())
    requested = None
    try:
        if forced := _dispatch.requested_backend():
            why = missing[forced]
            requested = f"{forced}, which cannot be used here: {why}" if why else forced
            order = (forced,)
    except Exception as error:  # LLAMA_MM_BACKEND holds no backend's name
        requested = f"{os.environ.get('LLAMA_MM_BACKEND')} ({error})"

    held = {*_dispatch._kernels, *((op, "torch") for op in OPS)}
    known = {backend for _, backend in held}  # a backend that cannot even be imported has named no kernels

    def state(op: str, backend: str) -> str:
        if (op, backend) not in held and backend in known:
            return "left to torch"
        if why := missing[backend]:
            return _short(why)
        there = (name for name in (*order, "torch") if (op, name) in held and missing[name] is None)
        return "in use" if backend == next(there) else "available"

    return {
        "device": device,
        "requested": requested,
        "ops": {op: {name: state(op, name) for name in ops.BACKENDS} for op in sorted({*OPS, *(op for op, _ in held)})},
        "missing": {name: why for name, why in missing.items() if why},
        "built": {name: report for name in ("cuda", "cpu") if (report := build_report(name))},
    }


def _short(reason: str) -> str:
    """The head of a reason, for a table's cell: "there is no CUDA device; …" → "no CUDA device"."""
    head = re.split(r"[;:,(]", reason)[0].strip()
    return re.sub(r"^(there is|its library( is)?|triton) ", "", head)


OPS = (
    "add_rms_norm", "apply_rope", "attention", "cross_attention", "decode_attention", "decode_blocks", "fp8_linear",
    "kv_write", "linear", "linear_cross_entropy", "linear_gelu", "packed_linear", "paged_decode_attention",
    "paged_decode_blocks", "prepare_weight", "quantized_kv_write", "quantized_paged_decode_attention", "rms_norm",
    "swiglu",
)  # fmt: skip
"""Every op that dispatches; those without a kernel register nothing, so they are named here."""


def _hub() -> dict[str, Any]:
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    there = next((folder for folder in (cache, *cache.parents) if folder.exists()), None)
    try:
        free = shutil.disk_usage(there).free if there else None
    except OSError:
        free = None
    return {
        "token": get_token() is not None,
        "offline": bool(constants.HF_HUB_OFFLINE),
        "cache": str(cache),
        "free_bytes": free,
    }


# --- for people ------------------------------------------------------------------------------------------------------


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)

    def section(title: str, rows: list[tuple[str, Any]]) -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(min_width=18, style="dim")
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, "-" if value is None else str(value))
        console.print(f"\n{title}", style="bold")
        console.print(table)

    section("Versions", list(report["versions"].items()))
    for extra, packages in report["extras"].items():
        section(f"Extra [{extra}] for {_FOR[extra]}".replace("[", r"\["), list(packages.items()))
    cpu, threads = report["cpu"], report["threads"] or {}
    section(
        "Machine",
        [
            ("system", report["system"]),
            ("processor", f"{cpu['model']}, {cpu['cores']} cores"),
            ("features", " ".join(cpu["features"]) or "none of those that help"),
            *((name, value) for name, value in threads.items()),
        ],
    )
    section(
        "Devices",
        [(d["name"], f"{d['what']}, {size(d['memory_bytes'] or 0)}") for d in report["devices"]],
    )
    if report["backends"]:
        _print_backends(console, report["backends"])
    hub, embedded = report["hub"], report["embedded_model"]
    section(
        "Models",
        [
            (embedded["name"], embedded["folder"] if embedded["available"] else "not in this copy"),
            ("hub token", "there" if hub["token"] else "none"),
            ("hub cache", hub["cache"] + (" (offline)" if hub["offline"] else "")),
            ("free space", None if hub["free_bytes"] is None else size(hub["free_bytes"])),
        ],
    )
    console.print("\nWhat is missing", style="bold")
    if not report["problems"]:
        console.print("nothing")
    for found in report["problems"]:
        console.print(f"{found['severity']}: {found['what']}\n    → {found['mend']}", markup=False, soft_wrap=True)
    sys.stdout.flush()


def _print_backends(console: Any, backends: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("op", no_wrap=True)
    for backend in next(iter(backends["ops"].values())):
        table.add_column(backend)
    for op, row in backends["ops"].items():
        table.add_row(op, *(state.replace("left to torch", "-") for state in row.values()))
    console.print(f"\nBackends, for tensors on {backends['device']} (-: left to torch)", style="bold")
    console.print(table)
    for backend, why in backends["missing"].items():
        console.print(f"{backend}: {why}", markup=False, soft_wrap=True)
    for backend, built in backends["built"].items():
        if built.get("built"):
            what = f"built by {built['compiler']} for {' '.join(built['archs'])}"
            console.print(f"{backend} library: {what}", markup=False, soft_wrap=True)
        elif built.get("why") and built["why"] not in backends["missing"].get(backend, ""):
            console.print(f"{backend} library: not built, {built['why']}", markup=False, soft_wrap=True)
    if backends["requested"]:
        console.print(f"LLAMA_MM_BACKEND asks for {backends['requested']}", markup=False, soft_wrap=True)
