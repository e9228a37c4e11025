"""Draws the pictures in examples/images: a shelf of coloured shapes, a printed word and a bar chart.

    python examples/draw_images.py

Needs the fonts of the optional extra: pip install -e ".[train]"
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from llama_multimodal.zoo.world import fonts

HERE = Path(__file__).parent / "images"
FINE = 3  # drawn this many times larger, then scaled down, for smooth edges

RED, ORANGE, YELLOW, GREEN = (214, 32, 38), (247, 143, 30), (250, 214, 40), (38, 150, 72)
BLUE, PURPLE, BROWN, BLACK = (38, 92, 214), (128, 52, 168), (122, 70, 34), (22, 22, 24)


def wood(width: int, height: int, light: tuple[int, int, int], dark: tuple[int, int, int]) -> Image.Image:
    """Grain in long horizontal streaks, always the same."""
    streaks = np.random.default_rng(11).random((height // 5, 12))
    knots = np.random.default_rng(12).random((height // 40, 5))
    share = np.asarray(Image.fromarray((streaks * 255).astype(np.uint8)).resize((width, height))) / 255 * 0.6
    share = share + np.asarray(Image.fromarray((knots * 255).astype(np.uint8)).resize((width, height))) / 255 * 0.4
    pixels = np.array(light) + share[..., None] * (np.array(dark) - np.array(light))
    return Image.fromarray(pixels.astype(np.uint8))


def regular(corners: int, x: float, y: float, radius: float, turn: float, inner: float = 1.0) -> list[tuple[int, int]]:
    """Corners of a polygon around (x, y); every second one at `inner` of the radius. turn: degrees."""
    points = []
    for k in range(corners):
        reach = radius * (inner if k % 2 else 1.0)
        angle = math.radians(turn + 360 * k / corners)
        points.append((round((x + reach * math.cos(angle)) * FINE), round((y + reach * math.sin(angle)) * FINE)))
    return points


def thing(
    pen: ImageDraw.ImageDraw, shape: str, color: tuple[int, int, int], x: float, floor: float, size: float
) -> None:
    """One shape `size` pixels across that stands on the line y = floor, with a darker edge."""
    r, edge = size / 2, tuple(int(c * 0.62) for c in color)
    line = round(size * 0.03 * FINE)
    y = floor - r
    if shape == "circle":
        box = [round(v * FINE) for v in (x - r, y - r, x + r, y + r)]
        pen.ellipse(box, fill=color, outline=edge, width=line)
        return
    if shape == "cross":
        arm = r * 0.33
        for a, b in ((r, arm), (arm, r)):
            pen.rectangle([round(v * FINE) for v in (x - a, y - b, x + a, y + b)], fill=edge)
        thin = line / FINE
        for a, b in ((r - thin, arm - thin), (arm - thin, r - thin)):
            pen.rectangle([round(v * FINE) for v in (x - a, y - b, x + a, y + b)], fill=color)
        return
    if shape == "square":
        points = regular(4, x, floor - r * math.sqrt(0.5), r, 45)
    elif shape == "triangle":
        points = regular(3, x, floor - r / 2, r, -90)
    elif shape == "hexagon":
        points = regular(6, x, floor - r * math.sqrt(0.75), r, 0)
    else:
        points = regular(10, x, floor - r * math.cos(math.radians(36)), r, -90, 0.45)
    pen.polygon(points, fill=color, outline=edge, width=line)


def shelf() -> Image.Image:
    """Eight things on the two boards of a wooden shelf; three of them are red circles."""
    width, height = 900, 600
    image = wood(width * FINE, height * FINE, (238, 220, 190), (222, 198, 160))
    pen = ImageDraw.Draw(image)
    for floor in (278, 566):
        pen.rectangle([v * FINE for v in (0, floor, width, floor + 9)], fill=(166, 124, 80))
        pen.rectangle([v * FINE for v in (0, floor + 9, width, floor + 13)], fill=(120, 86, 52))
    upper = (
        ("circle", RED, 110, 136),
        ("star", BLUE, 300, 150),
        ("circle", RED, 505, 80),
        ("hexagon", GREEN, 735, 152),
    )
    lower = (
        ("triangle", PURPLE, 150, 168),
        ("circle", RED, 395, 148),
        ("square", ORANGE, 600, 170),
        ("cross", BLACK, 790, 84),
    )
    for floor, row in ((278, upper), (566, lower)):
        for shape, color, x, size in row:
            thing(pen, shape, color, x, floor - 1, size)
    return image.reduce(FINE).filter(ImageFilter.GaussianBlur(0.4))


def face(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A face of the extra's fonts by its file name."""
    return fonts.load(next(path for family in fonts.faces() for path in family if Path(path).name == name), size)


def word(text: str = "Harbour") -> Image.Image:
    """A word in blue on pale paper, a little aslant."""
    ground = (244, 240, 230)
    image = Image.new("RGB", (640, 280), ground)
    ImageDraw.Draw(image).text((320, 140), text, font=face("Caladea-Bold.ttf", 128), fill=(30, 60, 140), anchor="mm")
    return image.rotate(2.5, resample=Image.Resampling.BICUBIC, fillcolor=ground)


def chart(values: tuple[int, ...] = (4, 7, 2, 9, 6)) -> Image.Image:
    """A bar chart of those values, the bars called A, B, C and so on."""
    image = Image.new("RGB", (720, 480), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    ink, left, right, top, bottom = (40, 40, 44), 70, 700, 50, 425
    for value in range(0, 11, 2):
        y = bottom - (bottom - top) * value / 10
        pen.line((left, y, right, y), fill=ink if value == 0 else (214, 214, 218), width=2)
        pen.text((left - 12, y), str(value), font=face("Roboto-Regular.ttf", 22), fill=ink, anchor="rm")
    pen.line((left, top, left, bottom), fill=ink, width=2)
    for index, value in enumerate(values):
        x = left + (right - left) * (index + 0.5) / len(values)
        pen.rectangle((x - 38, bottom - (bottom - top) * value / 10, x + 38, bottom - 2), fill=(38, 110, 190))
        pen.text((x, bottom + 28), "ABCDEF"[index], font=face("Roboto-Bold.ttf", 30), fill=ink, anchor="mm")
    return image


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for name, picture in (("shelf", shelf()), ("word", word()), ("chart", chart())):
        picture.save(HERE / f"{name}.png", optimize=True)
        print(HERE / f"{name}.png", picture.size)
