"""Draw docs/images/answer.png from benchmarks/results/answer.json: the first token and decoding, as multiples of what
transformers takes and gives.

    python docs/images/draw_answer.py

Needs the `train` extra (matplotlib).
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
RESULT = FOLDER.parent.parent / "benchmarks" / "results" / "answer.json"


def main() -> None:
    results = json.loads(RESULT.read_text(encoding="utf-8"))["results"]
    titles = [title.replace(", ", "\n", 1) for title in results][::-1]
    first = [row["first_token_seconds"] for row in results.values()][::-1]
    decode = [row["decode_tokens_per_second"] for row in results.values()][::-1]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3), layout="constrained", sharey=True)
    parts = (
        ("time to the first token", [row["transformers"] / row["ours"] for row in first], first, "{:.2f} s"),
        ("decoding", [row["ours"] / row["transformers"] for row in decode], decode, "{:.1f} tokens/s"),
    )
    for axis, (title, ratios, rows, unit) in zip(axes, parts, strict=True):
        bars = axis.barh(titles, ratios, color="#2f6fde")
        labels = [
            f"{ratio:.2f} x   {unit.format(row['ours'])} against {unit.format(row['transformers'])}"
            for ratio, row in zip(ratios, rows, strict=True)
        ]
        axis.bar_label(bars, labels, padding=4, fontsize=8)
        axis.axvline(1, color="#f0a830", linewidth=1.5)
        axis.set(title=title, xlabel="times as fast as transformers (the line)", xlim=(0, 1.9 * max(ratios)))
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(FOLDER / "answer.png", dpi=110)


if __name__ == "__main__":
    main()
