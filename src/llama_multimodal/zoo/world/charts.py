"""Pictures of bar charts, and where each bar and each letter below a bar is."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from llama_multimodal.zoo.world import fonts
from llama_multimodal.zoo.world.backgrounds import finish
from llama_multimodal.zoo.world.palette import contrast, object_color
from llama_multimodal.zoo.world.streams import plain
from llama_multimodal.zoo.world.types import CHARS, COLORS, Mark

LETTERS = "ABCDEFGH"
MAX_VALUE = 10
_MIN_CONTRAST = 32.0  # CIELab distance of bars and ground


def chart_values(rng: np.random.Generator) -> list[int]:
    """Three to six values from 1 to 10; the largest and the smallest occur once."""
    n = int(rng.integers(3, 7))
    while True:
        values = [int(v) for v in rng.integers(1, MAX_VALUE + 1, n)]
        if values.count(max(values)) == 1 and values.count(min(values)) == 1:
            return values


def chart_data(rng: np.random.Generator) -> tuple[list[int], list[str], list[int] | None]:
    """Values, names and, where bars are named by colour, the colour of each bar."""
    values = chart_values(rng)
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            return values, list(LETTERS[: len(values)]), None
        return values, [LETTERS[int(i)] for i in rng.permutation(len(LETTERS))[: len(values)]], None
    colors = [int(i) for i in rng.permutation(len(COLORS))[: len(values)]]
    return values, [COLORS[c] for c in colors], colors


def _canvas(rng: np.random.Generator) -> tuple[int, int]:
    long_side = round(math.exp(rng.uniform(math.log(240), math.log(1100))))
    short_side = max(200, round(long_side / rng.uniform(1.0, 1.9)))
    long_side = max(long_side, short_side)
    return (short_side, long_side) if rng.random() < 0.3 else (long_side, short_side)


def _shade(color: tuple[int, int, int], other: tuple[int, int, int], amount: float) -> tuple[int, int, int]:
    r, g, b = (round(a + (c - a) * amount) for a, c in zip(color, other, strict=True))
    return r, g, b


def _ground(rng: np.random.Generator, bars: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    """A plain ground against which every bar can be seen."""
    best, best_score = (255, 255, 255), -1.0
    for _ in range(5):
        kind = rng.random()
        low, high = (255, 256) if kind < 0.35 else (215, 256) if kind < 0.8 else (18, 60)
        r, g, b = (int(c) for c in rng.integers(low, high, 3))
        score = min(contrast((r, g, b), bar) for bar in bars)
        if score > _MIN_CONTRAST:
            return r, g, b
        if score > best_score:
            best, best_score = (r, g, b), score
    return best


def chart(rng: np.random.Generator) -> tuple[Image.Image, tuple[Mark, ...], tuple[str, ...]]:
    """A picture of a bar chart, its marks, and the name of each bar: a letter, or a colour word."""
    values, names, named_colors = chart_data(rng)
    n = len(values)
    draws = plain(rng)
    width, height = _canvas(rng)
    if named_colors is not None:
        fills = [object_color(draws, c) for c in named_colors]
    elif rng.random() < 0.5:
        fills = [object_color(draws, int(rng.integers(len(COLORS))))] * n
    else:
        fills = [object_color(draws, int(c)) for c in rng.integers(len(COLORS), size=n)]
    ground = _ground(rng, fills)
    ink = max(((20, 20, 20), (240, 240, 240)), key=lambda c: contrast(c, ground))
    line = _shade(ink, ground, float(rng.uniform(0.0, 0.35)))
    faint = _shade(ink, ground, float(rng.uniform(0.7, 0.88)))
    image = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(image)

    face = fonts.pick_face(rng)
    short_side = min(width, height)
    tick_font = fonts.load(face, max(11, int(short_side * rng.uniform(0.042, 0.062))))
    name_font = fonts.load(face, max(15, int(short_side * rng.uniform(0.065, 0.095))))
    value_font = fonts.load(face, max(12, int(short_side * rng.uniform(0.045, 0.065))))
    thin = max(1, round(short_side / 260))
    labelled = named_colors is None
    printed_values = rng.random() < 0.5

    left = int(tick_font.getlength("10")) + int(width * rng.uniform(0.03, 0.08)) + 6
    right = width - 1 - int(width * rng.uniform(0.03, 0.09))
    top = int(height * rng.uniform(0.04, 0.08)) + (value_font.size if printed_values else 4)
    below = int(name_font.size * 1.45) if labelled else 6
    base = height - 1 - below - int(height * rng.uniform(0.03, 0.07))

    if rng.random() < 0.25:
        draw.rectangle((left, top, right, base), fill=_shade(ground, ink, 0.04))
    step = int(rng.choice([1, 2, 5]))
    if (base - top) * step / MAX_VALUE < tick_font.size * 1.05:
        step = 2 if step == 1 else 5
    gridlines = rng.random() < 0.5
    for tick in range(0, MAX_VALUE + 1, step):
        y = base - (base - top) * tick / MAX_VALUE
        if gridlines and tick:
            draw.line((left, y, right, y), fill=faint, width=thin)
        draw.line((left - 4 * thin, y, left, y), fill=line, width=thin)
        draw.text((left - 6 * thin - 1, y), str(tick), font=tick_font, fill=ink, anchor="rm")

    slot = (right - left) / n
    bar_width = max(6.0, slot * float(rng.uniform(0.45, 0.85)))
    outlined = rng.random() < 0.3
    marks = []
    for index, (value, fill) in enumerate(zip(values, fills, strict=True)):
        x = left + slot * (index + 0.5)
        y = base - (base - top) * value / MAX_VALUE
        box = (round(x - bar_width / 2), round(y), round(x + bar_width / 2), base)
        draw.rectangle(box, fill=fill, outline=line if outlined else None, width=thin)
        color = -1 if named_colors is None else named_colors[index]
        marks.append(Mark("bar", float(x), float(y), color=color, index=index, value=value))
        if printed_values:
            draw.text((x, y - 2 * thin), str(value), font=value_font, fill=ink, anchor="mb")
    draw.line((left, base, right, base), fill=line, width=thin)
    if rng.random() < 0.8:
        draw.line((left, top, left, base), fill=line, width=thin)
    if rng.random() < 0.25:
        draw.rectangle((left, top, right, base), outline=line, width=thin)
    if labelled:
        for index, name in enumerate(names):
            x, y = left + slot * (index + 0.5), base + 3 * thin + name_font.size * 0.7
            # The box of the glyph itself is centred: faces differ in the room they leave above capitals.
            x0, y0, x1, y1 = name_font.getbbox(name)
            draw.text((x - (x0 + x1) / 2, y - (y0 + y1) / 2), name, font=name_font, fill=ink)
            marks.append(Mark("char", float(x), float(y), char=CHARS.index(name), index=index))
    return finish(draws, image), tuple(marks), tuple(names)
