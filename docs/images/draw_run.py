"""Draw docs/images/describe.png: real commands, run now, beside the pictures they are about.

    python docs/images/draw_run.py

Needs the `train` extra (its fonts) and an installed `llama-mm`.
"""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(__file__).parent
PICTURES = FOLDER.parent.parent / "examples" / "images"
RUNS = (
    ("shelf.png", ("How many red circles are there?", "Is there a yellow star?", "What shape is the purple thing?")),
    ("chart.png", ("Which bar is the highest?", "What is the value of bar B?")),
    ("word.png", ("What does it say?",)),
)
WIDTH, PICTURE, LINE = 1240, 330, 24
BACK, PROMPT, TEXT, ANSWER = (24, 26, 33), (120, 190, 255), (222, 222, 222), (150, 220, 140)


def font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf", size)


def answer(picture: Path, question: str) -> str:
    command = ["llama-mm", "describe", str(picture), question]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    mono = font(16)
    pieces = []
    for name, questions in RUNS:
        picture = Image.open(PICTURES / name).convert("RGB")
        picture.thumbnail((PICTURE, 260))
        lines: list[tuple[str, tuple[int, int, int]]] = []
        for question in questions:
            lines.append((f'$ llama-mm describe {name} "{question}"', PROMPT))
            reply = answer(PICTURES / name, question)
            lines += [(part, ANSWER) for part in textwrap.wrap(reply, 80) or [""]]
            lines.append(("", TEXT))
        pieces.append((picture, lines, max(picture.height, LINE * len(lines)) + 24))
    sheet = Image.new("RGB", (WIDTH, sum(height for *_, height in pieces) + 24), BACK)
    draw = ImageDraw.Draw(sheet)
    top = 24
    for picture, lines, height in pieces:
        sheet.paste(picture, (24 + (PICTURE - picture.width) // 2, top))
        for i, (text, color) in enumerate(lines):
            draw.text((PICTURE + 60, top + i * LINE), text, font=mono, fill=color)
        top += height
    sheet.save(FOLDER / "describe.png", optimize=True)


if __name__ == "__main__":
    main()
