"""What each memory saver of `llama-mm train` costs and saves: peak memory and tokens a second of the same run with it.

    OMP_PROC_BIND=true python benchmarks/memory_savers.py --scratch FOLDER --output benchmarks/results

Every variant runs in a process of its own, in bf16, and is drawn into docs/images/memory_savers.png. The models and
rows are those of train.py. Needs bitsandbytes and matplotlib besides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peers import arguments, write
from train import CASES, peak_resident, recipe_of

import llama_multimodal as lmm
from llama_multimodal.train.config import OptimConfig
from llama_multimodal.train.loop import train

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "memory_savers.png"
FULL: dict[str, Any] = {"method": "full", "lora": lmm.LoraConfig()}
EIGHT: dict[str, Any] = {"optim": OptimConfig(optimizer="adamw8bit", learning_rate=1e-5)}
EVERYWHERE: dict[str, Any] = {"lora": lmm.LoraConfig(targets="all-linear")}
CHECKPOINTING: dict[str, Any] = {"recompute": True}
ROWS = {"text": 8, "pictures": 2}  # of a step: the encoder's pass is long where it learns
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "text": {
        "full": FULL,
        "full, 8-bit Adam": FULL | EIGHT,
        "full, checkpointing": FULL | CHECKPOINTING,
        "LoRA, padded rows": {"packing": False},
        "LoRA": {},
        "LoRA, checkpointing": CHECKPOINTING,
        "QLoRA (NF4)": {"method": "qlora"},
        "QLoRA, checkpointing": {"method": "qlora", **CHECKPOINTING},
    },
    "pictures": {
        "LoRA, text and vision": EVERYWHERE,
        "LoRA, text and vision, checkpointing": EVERYWHERE | CHECKPOINTING,
    },
}


def alone(case: str, variant: str, args: argparse.Namespace) -> None:
    """One variant in this process: peak memory in MiB, and the median of the steps' speeds but for the first."""
    changes = dict(VARIANTS[case][variant])
    recipe = recipe_of(CASES[case], args)
    recipe = replace(
        recipe, batch=replace(recipe.batch, rows=ROWS[case], packing=changes.pop("packing", True)), **changes
    )
    speeds: list[float] = []
    train(recipe, lambda progress: speeds.append(progress.values["tokens_per_second"]))
    print(json.dumps({"peak_mib": peak_resident(), "tokens_per_second": statistics.median(speeds[1:])}))


def draw(results: dict[str, dict[str, dict[str, float]]], file: Path) -> None:
    """Bars of memory and of speed, side by side; one row of axes a case."""
    import matplotlib.pyplot as plt

    heights = [len(rows) for rows in results.values()]
    figure, grid = plt.subplots(
        len(results), 2, figsize=(11, 2.2 + 0.36 * sum(heights)), height_ratios=heights, layout="constrained"
    )
    columns = {"peak_mib": ("peak memory, GiB", 1024, "#8a8f98"),
               "tokens_per_second": ("tokens a second", 1, "#2f6fde")}  # fmt: skip
    for axes, (title, rows) in zip(grid, results.items(), strict=True):
        for axis, (key, (label, unit, colour)) in zip(axes, columns.items(), strict=True):
            values = [row[key] / unit for row in rows.values()]
            bars = axis.barh(list(rows), values, color=colour)
            axis.bar_label(bars, fmt="%.2f" if unit > 1 else "%.0f", padding=3)
            axis.set(title=f"{title}\n{label}", xlim=(0, 1.18 * max(values)))
            axis.invert_yaxis()
            axis.spines[["top", "right"]].set_visible(False)
        axes[1].set_yticklabels([])
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.recompute = False
    torch.set_num_threads(args.threads)
    if args.alone:
        alone(*args.alone, args)
        return
    results: dict[str, dict[str, dict[str, float]]] = {}
    for case, variants in VARIANTS.items():
        for variant in variants:
            command = [sys.executable, *sys.argv, "--alone", case, variant]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            results.setdefault(CASES[case].title, {})[variant] = found
            print(f"{variant:40s} {found['peak_mib']:7.0f} MiB {found['tokens_per_second']:7.0f} tokens/s", flush=True)
    write("memory_savers", results, args.output)
    draw(results, PICTURE)


if __name__ == "__main__":
    main()
