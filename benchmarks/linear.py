"""`packed_linear` of one matrix on the CPU against torch's packed products, beside what the memory reads at.

    OMP_PROC_BIND=true python benchmarks/linear.py --output benchmarks/results

All candidates run in turn, each over enough copies of its weight that no cache holds them; medians are compared, since
the memory's speed changes while the benchmark runs. int8 and int4 have a scale for 32 values (torch's int8: for a row).
"a8" stands for activations in 8 bits as well. llama.cpp, which always has them so, takes part where llama-cpp-python is
installed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ggml import installed, product
from peers import Measured, interleaved, write
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.ops import PackedWeight
from llama_multimodal.ops.backends.cpu import library
from llama_multimodal.ops.linear import cpu_multiplies

GROUP = 32
READ = "memory read"
UNCACHED = 96 << 20  # bytes that a candidate's copies take together

Candidate = tuple[Callable[[], Any], int]
"""What runs, and how many bytes of weights it reads."""


def in_turn(run: Callable[[Any], Any], make: Callable[[], Any], nbytes: int) -> Candidate:
    copies = [make() for _ in range(max(2, -(-UNCACHED // nbytes)))]
    turn = itertools.cycle(copies)
    return lambda: run(next(turn)), nbytes


def memory_read() -> Candidate:
    """torch's maximum reads as fast as a loop that does nothing else, and needs no compiler."""
    values = torch.randn(UNCACHED // 4).view(4, -1)
    return in_turn(lambda part: part.amax(), iter(itertools.cycle(values)).__next__, values[0].nbytes)


def ours(x: Tensor, packed: PackedWeight, int8_activations: bool = False) -> Candidate:
    def copy() -> PackedWeight:
        tensors = {name: getattr(packed, name) for name in ("values", "scales", "zeros")}
        return replace(packed, **{name: t.clone() for name, t in tensors.items() if t is not None})

    return in_turn(lambda weight: ops.packed_linear(x, weight, None, int8_activations), copy, packed.nbytes)


BITS = {"bf16": 16, "int8": 8 + 16 / GROUP, "int4": 4 + 16 / GROUP}
"""Of a weight in llama.cpp's formats, scales included."""
LLAMA_CPP = {"bf16": "bf16 llama.cpp", "int8": "int8 llama.cpp (Q8_0)", "int4": "int4 llama.cpp (Q4_0)"}


def candidates(x: Tensor, weight: Tensor, threads: int) -> dict[str, Candidate]:
    outputs, inputs = weight.shape
    found = {READ: memory_read()}
    for format in ("bf16", "int8", "int4"):
        packed = ops.prepare_weight(ops.pack_weight(weight, format, group=GROUP))
        found[f"{format} ours"] = ours(x, packed)
        if format != "bf16":
            found[f"{format} ours, a8"] = ours(x, packed, int8_activations=True)

    half = weight.bfloat16()
    found["bf16 torch"] = in_turn(lambda w: F.linear(x, w), half.clone, half.nbytes)
    wide = x.float()
    found["fp32 torch"] = in_turn(lambda w: F.linear(wide, w), weight.clone, weight.nbytes)
    if cpu_multiplies(torch.bfloat16):  # oneDNN refuses to pack for a CPU without
        found["bf16 torch, packed by oneDNN"] = in_turn(
            lambda w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
            lambda: torch.ops.mkldnn._reorder_linear_weight(half, len(x)),
            half.nbytes,
        )
    stored = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    scales = torch.rand(outputs).bfloat16()
    found["int8 torch (int8pack)"] = in_turn(
        lambda w: torch.ops.aten._weight_int8pack_mm(x, w, scales), stored.clone, stored.nbytes + scales.nbytes
    )
    nibbles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        torch.randint(0, 16, (outputs, inputs), dtype=torch.int32), 1
    )
    steps = torch.rand(inputs // GROUP, outputs, 2).bfloat16()  # scale and zero
    found["int4 torch (int4pack)"] = in_turn(
        lambda w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w[0], GROUP, w[1]),
        lambda: (nibbles.clone(), steps.clone()),
        nibbles.nbytes + steps.nbytes,
    )
    if installed():
        for format, name in LLAMA_CPP.items():
            found[name] = in_turn(
                lambda run: run(),
                functools.partial(product, wide, weight, format, threads),
                int(weight.numel() * BITS[format] / 8),
            )
    return found


def table(title: str, measured: Measured, nbytes: dict[str, int]) -> None:
    """Medians, GB/s of weights, the share of the memory's own speed, and how much faster we are than each peer."""
    rate = {name: nbytes[name] / row["seconds"] / 1e9 for name, row in measured.items()}
    print(f"\n{title}")
    for name in sorted(measured):
        row, format = measured[name], name.split()[0]
        own = measured.get(f"{format} ours")
        peer = "" if own is None or own is row else f"   {row['seconds'] / own['seconds']:5.2f} x our time"
        print(
            f"  {name:30s} {row['seconds'] * 1e3:8.3f} ms  ({row['fastest'] * 1e3:.3f} to {row['slowest'] * 1e3:.3f})"
            f"  {rate[name]:5.1f} GB/s  {rate[name] / rate[READ]:4.0%} of the memory's{peer}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--outputs", type=int, default=8192)
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 512], help="of x; from 64 on, fewer repeats")
    parser.add_argument("--output", type=Path, help="folder for the JSON result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    weight = torch.randn(args.outputs, args.inputs) / args.inputs**0.5
    results = {}
    with torch.inference_mode(), ops.use_backend("cpu"):
        for rows in args.rows:
            found = candidates(torch.randn(rows, args.inputs).bfloat16(), weight, args.threads)
            runs = {name: run for name, (run, _) in found.items()}
            measured = interleaved(runs, args.repeats if rows < 64 else max(3, args.repeats // 20))
            table(
                f"{rows} x {args.inputs} by {args.outputs} x {args.inputs}, on {library.instruction_set()}",
                measured,
                {name: nbytes for name, (_, nbytes) in found.items()},
            )
            results[f"{rows} rows"] = {
                name: {**row, "weight_bytes": found[name][1], "of_memory": found[name][1] / row["seconds"]}
                for name, row in measured.items()
            }
    write("linear", {"instruction_set": library.instruction_set(), **results}, args.output)


if __name__ == "__main__":
    main()
