"""Sheets: pictures full of shapes, letters and words, from which a vision encoder learns to see.

A scene of the world has five things on four tiles; a sheet has a dozen on each. Nothing is asked about it.
"""

from __future__ import annotations

import dataclasses
import math
import random

from PIL import Image

from . import fonts
from .backgrounds import background, finish
from .palette import tone_on
from .printed import Row, random_text, readable_ink
from .shapes import draw_shape
from .types import CHARS, COLORS, SHAPES, Mark

_SIDES = (128, 256, 256)  # pixels of the width and of the height: one tile of the embedded model or two
_DIAMETERS = (16.0, 0.85)  # pixels, and of the shorter side
_HEIGHTS = (11, 44)  # pixels, the font sizes of words
_MISSES = 20  # this many places in a row that are taken: the sheet is full


def paint_sheet(rng: random.Random) -> tuple[Image.Image, tuple[Mark, ...]]:
    """A picture and what is where in it."""
    width, height = rng.choice(_SIDES), rng.choice(_SIDES)
    flat = rng.random() < 0.4
    behind = background(rng, width, height, "paper" if flat else "calm" if rng.random() < 0.5 else "any")
    image = behind.paint()
    upright, letters = rng.choice((0.0, 0.3, 1.0)), rng.choice((0.0, 0.4, 0.4, 1.0))
    most = rng.uniform(24.0, _DIAMETERS[1] * min(width, height))
    found: list[tuple[float, float, float]] = []
    marks: list[Mark] = []
    for _ in range(rng.choice((0, 0, 2, 4, 6)) if letters else 0):
        marks += _word(rng, image, found, readable_ink(rng, behind))
    misses = 0
    while misses < _MISSES:
        diameter = math.exp(rng.uniform(math.log(_DIAMETERS[0]), math.log(most)))
        reach = diameter / 2
        x, y = rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)
        if not _is_free(found, x, y, reach):
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


def _is_free(found: list[tuple[float, float, float]], x: float, y: float, reach: float) -> bool:
    """Whether a circle touches none of the circles (x, y, radius) that are taken."""
    return all(math.hypot(x - a, y - b) >= reach + other + 2 for a, b, other in found)


def _letter(
    rng: random.Random, image: Image.Image, x: float, y: float, diameter: float, ink: tuple[int, int, int]
) -> Mark:
    """One character within the circle of that diameter, turned by up to 5 degrees; it is in no word's place."""
    row = Row(rng.choice(CHARS), fonts.pick_face(rng), max(10, round(diameter * 0.95)), 0.0)
    angle = _tilt(rng)
    mask = row.draw(angle)
    image.paste(ink, (round(x - mask.width / 2), round(y - mask.height / 2)), mask)
    return dataclasses.replace(row.marks((x, y), angle)[0], index=-1)


def _word(
    rng: random.Random, image: Image.Image, found: list[tuple[float, float, float]], ink: tuple[int, int, int]
) -> tuple[Mark, ...]:
    """A word or number where there is room for it, which is added to `found`; nothing if there is none."""
    text, face, spacing = random_text(rng), fonts.pick_face(rng), rng.choice((0.02, 0.02, 0.1))
    wide = Row(text, face, 100, spacing).width / 100
    most = min(_HEIGHTS[1], int((image.width - 8) / wide))
    row, angle = Row(text, face, rng.randint(min(_HEIGHTS[0], most), most), spacing), _tilt(rng)
    mask = row.draw(angle)
    if mask.width > image.width:
        return ()
    for _ in range(_MISSES):
        left, top = rng.randint(0, image.width - mask.width), rng.randint(0, image.height - mask.height)
        marks = row.marks((left + mask.width / 2, top + mask.height / 2), angle)
        taken = [(m.x, m.y, row.height / 2) for m in marks]
        if all(_is_free(found, *circle) for circle in taken):
            image.paste(ink, (left, top), mask)
            found.extend(taken)
            return marks
    return ()


def _tilt(rng: random.Random) -> float:
    """Radians: half of the time none, else up to 5 degrees either way."""
    return math.radians(rng.uniform(-5, 5)) if rng.random() < 0.5 else 0.0
