"""Evaluate the embedded model and write its card: docs/tiny.md, its pictures, and the table in the README.

    python docs/make_tiny_card.py --run runs/tiny --per-kind 300

`--run` is the training run's folder, for the loss curve; without it the curve stays as it is.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import llama_multimodal as lmm
from llama_multimodal.eval.harness import Report, Score, evaluate
from llama_multimodal.train import plots
from llama_multimodal.zoo.world import sample

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"


def percent(score: Score) -> str:
    low, high = score.interval
    return f"{100 * score.right / max(1, score.total):.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def table(report: Report) -> str:
    """Pooled scores against their targets, then every kind of question."""
    lines = ["| questions | exact match, 95 % interval | asked | to reach |", "|---|---|---|---|"]
    for name, (score, target) in report.pooled().items():
        met = "" if 100 * score.right >= target * score.total else " (not reached)"
        lines.append(f"| {name} | {percent(score)} | {score.total} | {target} %{met} |")
    return "\n".join(lines)


def kinds_table(report: Report) -> str:
    lines = ["| kind | exact match, 95 % interval | right | asked |", "|---|---|---|---|"]
    for kind, score in report.scores.items():
        lines.append(f"| `{kind}` | {percent(score)} | {score.right} | {score.total} |")
    return "\n".join(lines)


def draw_failures(report: Report, path: Path) -> None:
    """Up to two wrong answers of each kind, with their pictures."""
    import matplotlib

    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 13)
    shown = [(kind, failure) for kind, score in report.scores.items() for failure in score.failures[:2]][:24]
    columns, width, height = 6, 220, 270
    sheet = Image.new("RGB", (columns * width, -(-len(shown) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (_, failure) in enumerate(shown):
        left, top = i % columns * width + 8, i // columns * height + 8
        picture = sample(failure.seed, split="heldout").image
        if picture is not None:
            picture = picture.copy()
            picture.thumbnail((width - 16, 150))
            sheet.paste(picture, (left, top))
        text = f"{failure.question}\nanswer: {failure.answer}\nright: {failure.truth}"
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 31)]
        for j, line in enumerate(lines[:6]):
            draw.text((left, top + 158 + 16 * j), line, font=font, fill="black")
    sheet.save(path, optimize=True)


def replace(path: Path, marker: str, text: str) -> None:
    """Put `text` between the marker's two comments."""
    old = path.read_text(encoding="utf-8")
    pattern = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
    path.write_text(re.sub(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", old, flags=re.S), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--per-kind", type=int, default=300)
    args = parser.parse_args()
    model, processor = lmm.load("tiny", dtype="float32")
    report = evaluate(
        model, processor, per_kind=args.per_kind, progress=lambda done, of: print(f"\r{done} of {of}", end="")
    )
    print()
    card = DOCS / "tiny.md"
    replace(card, "scores", table(report))
    replace(README, "tiny-table", table(report))
    replace(card, "kinds", kinds_table(report))
    draw_failures(report, DOCS / "images" / "tiny_failures.png")
    if args.run:
        plots.plot_run(args.run, DOCS / "images" / "tiny_loss.png")
    print(table(report))


if __name__ == "__main__":
    main()
