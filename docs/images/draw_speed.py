"""Draw docs/images/cpu_speed.png from benchmarks/results/generate_zen5.json: prefill and decoding, ours and others.

    python docs/images/draw_speed.py

Needs the `train` extra (matplotlib).
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
RESULT = FOLDER.parent.parent / "benchmarks" / "results" / "generate_zen5.json"
OURS = ("bf16 packed", "int8", "int8 a8", "int4", "int4 a8")
OTHERS = ("transformers bf16", "llama.cpp BF16", "llama.cpp Q8_0", "llama.cpp Q4_0")
COLOURS = {"llama_multimodal": "#2f6fde", "transformers": "#f0a830", "llama.cpp": "#8a8f98"}


def who(name: str) -> str:
    return "llama_multimodal" if name in OURS else name.split()[0]


def main() -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    titles = {"decode": "decoding, one sequence", "prefill": "prefill, 512 tokens"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        rates = result["results"][f"{kind}_tokens_per_second"]
        names = [*OURS, *OTHERS][::-1]
        bars = axis.barh(names, [rates[name] for name in names], color=[COLOURS[who(name)] for name in names])
        axis.bar_label(bars, fmt="%.1f" if kind == "decode" else "%.0f", padding=3)
        axis.set(title=title, xlabel="tokens per second", xlim=(0, 1.15 * max(rates[name] for name in names)))
        axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, COLOURS, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(FOLDER / "cpu_speed.png", dpi=110)


if __name__ == "__main__":
    main()
