"""Every op on every backend that has a kernel for it, beside eager torch, torch.compile and Liger-Kernel, on a GPU.

    PYTHONPATH=src python benchmarks/ops.py --output benchmarks/results

All candidates of a row run in turn over the same inputs, together with a copy that moves as many bytes; medians are
compared. A row's share of the copy's speed is the least that the op has to move over what it took, so it counts what a
kernel moves in vain against it. Peers that cannot run a row are named with the reason. Without a GPU nothing is
measured; `--device cpu --quick` tries the program itself out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from ops_rows import ROWS, TINY, Row, by_liger, on_backend, reference, run
from ops_timing import Timer, about, copies_of, copy, interleaved, summary
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.ops import _dispatch

COPY, EAGER, COMPILED, LIGER = "copy", "eager", "torch.compile", "liger"
BANDWIDTH_BYTES = 2 << 30  # of the copy that says what the device's memory can do at all
TOLERANCE = 5e-2  # of the largest value: a candidate must compute the same, or its time says nothing


def backends_for(row: Row, args: Sequence[Any]) -> list[str]:
    """The backends whose kernel takes a row's arguments, as the dispatch has them."""
    found = []
    for backend in ops.available().get(row.op, ()):
        kernel = _dispatch._kernels[row.op, backend]
        keywords = dict(row.keywords)
        if not kernel.leaves(*args, **keywords) and _dispatch._objection(kernel, tuple(args), keywords) is None:
            found.append(backend)
    return found or (["torch"] if row.eager else [])  # torch's best against torch written out


def candidates(row: Row, args: Sequence[Any], compiler: str) -> dict[str, Callable[[], Callable[..., Any]]]:
    """Each candidate's name and what makes the function; making it may raise."""
    found: dict[str, Callable[[], Callable[..., Any]]] = {EAGER: lambda: reference(row)}
    found[COMPILED] = lambda: reference(row, lambda function: torch.compile(function, backend=compiler, dynamic=False))
    found[LIGER] = lambda: by_liger(row.op)
    for backend in backends_for(row, args):
        found[backend] = lambda backend=backend: on_backend(row, backend)
    return found


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in tensors(part)] if isinstance(value, list | tuple) else []


def difference(ours: Any, expected: Any) -> float:
    """The largest difference of any output, as a share of that output's largest value."""
    shares = [
        (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-9)
        for a, b in zip(tensors(ours), tensors(expected), strict=True)
    ]
    return float(torch.stack(shares).max().detach())


def measure(row: Row, device: str, repeats: int, compiler: str) -> dict[str, Any]:
    torch._dynamo.reset()

    def fresh() -> list[Any]:
        torch.manual_seed(0)
        return row.make(device)

    copies = copies_of(row.cost.bytes) if device == "cuda" else 2
    inputs = [row.make(device) for _ in range(copies)]
    with torch.no_grad():
        expected = [x.detach().clone() for x in tensors(run(row, reference(row), fresh()))]
    timers, left_out, differences = {COPY: copy(row.cost.bytes, copies, device)}, {}, {}
    for name, make in candidates(row, inputs[0], compiler).items():
        try:
            function = make()
            differences[name] = difference(run(row, function, fresh()), expected)
            if not differences[name] < TOLERANCE:
                raise ValueError(f"differs from eager torch by {differences[name]:.1%} of the largest value")
            timers[name] = Timer(lambda i, function=function: run(row, function, inputs[i]), copies, device)
        except Exception as error:  # a peer that cannot do a row must not end the run
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    times = {name: summary(seconds) for name, seconds in interleaved(timers, repeats).items()}
    ours = [name for name in times if name not in (COPY, EAGER, COMPILED, LIGER)]
    for name, row_times in times.items():
        row_times["gb_per_s"] = row.cost.bytes / row_times["median"] / 1e3
        row_times["of_copy"] = times[COPY]["median"] / row_times["median"]
        row_times["captured"] = timers[name].captured
        if name in differences:
            row_times["difference"] = differences[name]
    best = min(ours, key=lambda name: times[name]["median"], default=None)
    peers = [name for name in (EAGER, COMPILED, LIGER) if name in times]
    return {
        "op": row.op,
        "bytes": row.cost.bytes,
        "operations": row.cost.operations,
        "copies": copies,
        "us": times,
        "left_out": left_out,
        "best": best,
        "times_as_fast_as": {name: times[name]["median"] / times[best]["median"] for name in peers} if best else {},
    }


def show(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name}: {result['bytes'] / 1e6:.1f} MB")
    for candidate, row in result["us"].items():
        times = "" if candidate not in result["times_as_fast_as"] else (
            f"   {result['times_as_fast_as'][candidate]:6.2f} x the time of {result['best']}"
        )  # fmt: skip
        print(
            f"  {candidate:14s} {row['median']:10.2f} us  ({row['p20']:.2f} to {row['p80']:.2f})"
            f"  {row['gb_per_s']:7.0f} GB/s  {row['of_copy']:5.0%} of the copy"
            f"{'' if row['captured'] else '  not captured'}{times}"
        )
    for candidate, why in result["left_out"].items():
        print(f"  {candidate:14s} left out: {why}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: whether it runs, not how fast")
    parser.add_argument("--only", nargs="+", metavar="OP", help="rows of these ops")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=150, help="after so many no new row is begun")
    parser.add_argument("--output", type=Path, help="folder for the JSON result")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/ops.py: skipped, there is no GPU (benchmarks/linear.py measures the CPU's kernels)")
        return 0
    began = time.monotonic()
    compiler = "inductor" if args.device == "cuda" else "aot_eager"
    facts = about(args.device)
    nbytes = BANDWIDTH_BYTES if args.device == "cuda" else 1 << 20
    seconds = interleaved({COPY: copy(nbytes, 2, args.device)}, args.repeats)[COPY]
    facts["copy_gb_per_s"] = nbytes / summary(seconds)["median"] / 1e3
    facts["missing"] = {name: why for name in ops.BACKENDS if (why := _dispatch.why_missing(name))}
    print(f"{facts['device']}, torch {facts['torch']}: a large copy moves {facts['copy_gb_per_s']:.0f} GB/s")
    for name, why in facts["missing"].items():
        print(f'backend "{name}" is not measured: {why}')
    rows = [row for row in (TINY if args.quick else ROWS) if not args.only or row.op in args.only]
    results, not_begun = {}, []
    for row in rows:
        if time.monotonic() - began > args.seconds:
            not_begun.append(row.name)
            continue
        results[row.name] = measure(row, args.device, args.repeats, compiler)
        show(row.name, results[row.name])
        if args.device == "cuda":
            torch.cuda.empty_cache()
    if not_begun:
        print(f"\nno time was left (--seconds) for: {'; '.join(not_begun)}")
    print(f"\n{len(results)} of {len(rows)} rows in {time.monotonic() - began:.0f} s")
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        path = args.output / f"ops-{re.sub(r'[^a-z0-9]+', '-', facts['device'].lower())}.json"
        written = {**facts, "rows": results, "not_begun": not_begun}
        path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
