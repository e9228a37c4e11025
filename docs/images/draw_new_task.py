"""Draw docs/images/new_task.png: the first held-out pictures of the new task, and the embedded model's answers without
and with its adapter.

    python examples/new_task.py && llama-mm train recipes/tiny-lora.yaml
    python docs/images/draw_new_task.py

Needs the `train` extra (matplotlib).
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image

import llama_multimodal as lmm

FOLDER, TASK = Path(__file__).parent, Path("runs/new-task")
ADAPTER = "runs/tiny-lora/adapter"


def main() -> None:
    model, processor = lmm.load("tiny", dtype=torch.float32, device="cpu")
    lmm.load_adapter(model, ADAPTER, "new")
    rows = [json.loads(line) for line in (TASK / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:8]]
    figure, grid = plt.subplots(1, 8, figsize=(14, 2.7), layout="constrained")
    for axis, row in zip(grid, rows, strict=True):
        question, truth = (message["content"] for message in row["messages"])
        image = Image.open(TASK / row["images"][0])
        parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs, answers = processor([{"role": "user", "content": parts}]), []
        for adapter in (None, "new"):
            with lmm.use_adapter(model, adapter):
                answers.append(lmm.generate(model, inputs, lmm.SamplingParams(max_new_tokens=8)).texts[0])
        before, after = (text if len(text) < 16 else text[:14] + " …" for text in answers)
        axis.imshow(image)
        axis.set_axis_off()
        words = question.split()
        half = -(-len(words) // 2)
        axis.set_title(" ".join(words[:half]) + "\n" + " ".join(words[half:]), fontsize=8)
        colour = "#1a7f37" if answers[1] == truth else "#c0392b"
        for y, text, tone in ((-0.08, f"before: {before}", "#8a8f98"), (-0.24, f"after: {after}", colour)):
            axis.text(0.5, y, text, transform=axis.transAxes, ha="center", va="top", fontsize=9, color=tone)
    figure.savefig(FOLDER / "new_task.png", dpi=100)


if __name__ == "__main__":
    main()
