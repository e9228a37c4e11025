"""Draw docs/images/cpu_speed.png from benchmarks/results/generate*.json: prefill and decoding, ours and others.

    python docs/images/draw_speed.py

Needs the `train` extra (matplotlib).
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent.parent / "benchmarks" / "results"
MODELS = {"Llama 3.2 1B": "generate.json", "SmolLM2 135M": "generate_smollm2.json"}
OURS = ("bf16 packed", "int8", "int8 a8", "int4", "int4 a8")
OTHERS = ("transformers bf16", "llama.cpp BF16", "llama.cpp Q8_0", "llama.cpp Q4_0")
COLOURS = {"llama_multimodal": "#2f6fde", "transformers": "#f0a830", "llama.cpp": "#8a8f98"}


def who(name: str) -> str:
    return "llama_multimodal" if name in OURS else name.split()[0]


def main() -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.6), layout="constrained")
    titles = {"decode": "decoding, one sequence", "prefill": "prefill, 512 tokens"}
    panels = itertools.product(MODELS.items(), titles.items())
    for axis, ((model, file), (kind, title)) in zip(axes.flat, panels, strict=True):
        result = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        rates = result["results"][f"{kind}_tokens_per_second"]
        names = [*OURS, *OTHERS][::-1]
        bars = axis.barh(names, [rates[name] for name in names], color=[COLOURS[who(name)] for name in names])
        axis.bar_label(bars, fmt="%.1f" if kind == "decode" else "%.0f", padding=3)
        axis.set(
            title=f"{model}: {title}", xlabel="tokens per second", xlim=(0, 1.15 * max(rates[name] for name in names))
        )
        axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, COLOURS, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(FOLDER / "cpu_speed.png", dpi=110)


if __name__ == "__main__":
    main()
