"""Loading a checkpoint: time and peak memory, against transformers, in fresh processes.

    OMP_PROC_BIND=true python benchmarks/load.py --scratch FOLDER --output benchmarks/results

The checkpoint is about 2.5 GB in bf16. Peak memory is that of the whole process, above an import of the library.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

from peers import arguments, random_mllama, write

CHILD = """
import json, sys, time, torch
folder = sys.argv[1]
if sys.argv[2] == "ours":
    import llama_multimodal.loading as loader
else:
    from transformers import MllamaForConditionalGeneration
def peak_mib():  # not ru_maxrss, which a process inherits from the one that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
base = peak_mib()
start = time.perf_counter()
if sys.argv[2] == "ours":
    model, _ = loader.load(folder, dtype=torch.bfloat16)
else:
    model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
# Reading something of every page: a loader that only maps the file has not loaded it yet.
total = sum(float(p.detach().view(torch.int16).flatten()[::2048].sum()) for p in model.parameters())
seconds = time.perf_counter() - start
peak = peak_mib()
print(json.dumps({"seconds": seconds, "peak_mib": peak - base, "weights_mib": weights}))
"""


def measure(folder: Path, who: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder), who], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = arguments(__doc__).parse_args()
    folder = random_mllama(args.scratch, text_hidden=2048, text_layers=22, vision_layers=14, tile=448)
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
    for _ in range(args.repeats):
        for who, kept in runs.items():
            kept.append(measure(folder, who))
    results = {}
    for who, kept in runs.items():
        row = {key: statistics.median(run[key] for run in kept) for key in kept[0]}
        row["peak_over_weights"] = row["peak_mib"] / row["weights_mib"]
        results[who] = row
        print(
            f"{who:14s} {row['seconds']:6.2f} s   peak {row['peak_mib']:6.0f} MiB ="
            f" {row['peak_over_weights']:.2f} x the weights ({row['weights_mib']:.0f} MiB)"
        )
    write("load", results, args.output)


if __name__ == "__main__":
    main()
