"""Sheets: small pictures full of shapes and letters, from which a vision encoder learns to see.

A scene of the world has five things on four tiles; a sheet has a dozen on one. Nothing is asked about it.
"""

from __future__ import annotations

import math
import random

from PIL import Image

from . import fonts
from .backgrounds import background, finish
from .palette import tone_on
from .printed import Row, readable_ink
from .shapes import draw_shape
from .types import CHARS, COLORS, SHAPES, Mark

_SIDE = 128  # pixels: one tile of the embedded model
_DIAMETERS = (16.0, 60.0)  # pixels
_MISSES = 20  # this many places in a row that are taken: the sheet is full


def paint_sheet(rng: random.Random) -> tuple[Image.Image, tuple[Mark, ...]]:
    """A square picture and what is where in it."""
    flat = rng.random() < 0.4
    behind = background(rng, _SIDE, _SIDE, "paper" if flat else "calm" if rng.random() < 0.5 else "any")
    image = behind.paint()
    upright, letters = rng.choice((0.0, 0.3, 1.0)), rng.choice((0.0, 0.4, 0.4, 1.0))
    most = rng.uniform(24.0, _DIAMETERS[1])
    found: list[tuple[float, float, float]] = []
    marks: list[Mark] = []
    misses = 0
    while misses < _MISSES:
        diameter = math.exp(rng.uniform(math.log(_DIAMETERS[0]), math.log(most)))
        reach = diameter / 2
        x, y = rng.uniform(reach, _SIDE - reach), rng.uniform(reach, _SIDE - reach)
        if any(math.hypot(x - a, y - b) < reach + other + 2 for a, b, other in found):
            misses += 1
            continue
        misses = 0
        found.append((x, y, reach))
        if rng.random() < letters:
            marks.append(_letter(rng, image, x, y, diameter, readable_ink(rng, behind)))
            continue
        color, shape = rng.randrange(len(COLORS)), rng.randrange(len(SHAPES))
        tone = tone_on(rng, color, behind.colors, vivid=0.8 if flat else 0.25)
        if tone is not None:
            draw_shape(rng, image, x, y, diameter, shape, color, tone, upright=upright, flat=flat)
            marks.append(Mark("object", x, y, (x - reach, y - reach, x + reach, y + reach), shape=shape, color=color))
    return finish(rng, image), tuple(marks)


def _letter(
    rng: random.Random, image: Image.Image, x: float, y: float, diameter: float, ink: tuple[int, int, int]
) -> Mark:
    """One character within the circle of that diameter, turned by up to 5 degrees."""
    char = rng.choice(CHARS)
    row = Row(char, fonts.pick_face(rng), max(10, round(diameter * 0.95)), 0.0)
    mask = row.draw()
    mask = mask.rotate(rng.uniform(-5, 5), resample=Image.Resampling.BICUBIC)
    image.paste(ink, (round(x - mask.width / 2), round(y - mask.height / 2)), mask)
    half_w, half_h = row.width / 2, row.height / 2
    return Mark("char", x, y, (x - half_w, y - half_h, x + half_w, y + half_h), char=CHARS.index(char))
