"""Pictures of coloured shapes: what is where is planned first, so that texts can be made without painting."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image

from .backgrounds import Background, background, canvas_size, finish, thumbnail_size
from .palette import RGB, tone_on
from .shapes import draw_shape
from .types import COLORS, SHAPES, Mark

Place = tuple[float, float, float, int]  # centre x, y and diameter in pixels; index of SIZES or -1


@dataclass(frozen=True)
class Scene:
    """Marks of 1 to 9 things that do not touch, with a diameter and a tone for each."""

    width: int
    height: int
    marks: tuple[Mark, ...]
    diameters: tuple[float, ...]
    tones: tuple[RGB, ...]
    behind: Background
    flat: bool  # as from a paint program: light paper, plain fills


def plan_scene(rng: random.Random, small: float = 0.0) -> Scene:
    """Canvas 120 to 1200 pixels a side, half of them within 2:1 and the others up to 10:1; small: see `sample`."""
    draw = rng.random()
    width, height = canvas_size(rng, (1, 2) if draw < 0.53 else (2, 10))
    if draw < 0.12 or rng.random() < small:
        width, height = thumbnail_size(rng)
    if rng.random() < 0.5:
        width, height = height, width
    flat = rng.random() < 0.38
    behind = background(rng, width, height, "paper" if flat else "any")
    vivid = 0.8 if flat else 0.25
    # A name whose tones are all too close to this background is left out.
    usable = [c for c in range(len(COLORS)) if tone_on(rng, c, behind.colors, vivid=vivid) is not None]
    places = _places(rng, width, height, rng.randint(1, 9))
    marks, diameters, tones = [], [], []
    fixed: dict[int, RGB] = {}
    same_tone = rng.random() < 0.5
    for (x, y, diameter, size), (shape, color) in zip(places, _cast(rng, len(places), usable), strict=True):
        tone = fixed.get(color) or tone_on(rng, color, behind.colors, vivid=vivid, tries=40)
        if tone is None:
            continue
        if same_tone:
            fixed[color] = tone
        reach = diameter / 2
        box = (x - reach, y - reach, x + reach, y + reach)
        marks.append(Mark("object", x, y, box, shape=shape, color=color, size=size))
        diameters.append(diameter)
        tones.append(tone)
    if not marks:
        return plan_scene(rng, small)
    return Scene(width, height, tuple(marks), tuple(diameters), tuple(tones), behind, flat)


def paint_scene(rng: random.Random, scene: Scene) -> Image.Image:
    """The picture of a planned scene."""
    image = scene.behind.paint()
    upright = rng.choice((0.0, 0.3, 1.0))
    for mark, diameter, tone in zip(scene.marks, scene.diameters, scene.tones, strict=True):
        draw_shape(rng, image, mark.x, mark.y, diameter, mark.shape, mark.color, tone, upright=upright, flat=scene.flat)
    return finish(rng, image)


def _cast(rng: random.Random, count: int, usable: list[int]) -> list[tuple[int, int]]:
    """Shape and colour of every thing. Repeats are common, so that counts above 1 are."""
    every = range(len(SHAPES))
    draw = rng.random()
    if draw < 0.3:
        return [(rng.choice(every), rng.choice(usable)) for _ in range(count)]
    if draw < 0.6:
        shapes = rng.sample(every, rng.randint(1, 3))
        colors = rng.sample(usable, min(len(usable), rng.randint(1, 3)))
        return [(rng.choice(shapes), rng.choice(colors)) for _ in range(count)]
    shape, color = rng.choice(every), rng.choice(usable)
    copies = rng.randint(1, min(count, 6))
    cast = [(shape, color)] * copies
    while len(cast) < count:
        kind = rng.random()  # the same shape in another colour, the same colour in another shape, or anything
        cast.append((shape if kind < 0.3 else rng.choice(every), color if 0.3 <= kind < 0.6 else rng.choice(usable)))
    rng.shuffle(cast)
    return cast


def _places(rng: random.Random, width: int, height: int, count: int) -> list[Place]:
    """Where `count` things go (fewer if they do not fit), in random order."""
    draw = rng.random()
    places: list[Place] = []
    if draw < 0.3:
        places = _rows(rng, width, height, _sizes(rng, width, height, count))
    for _ in range(4):
        if len(places) == count:
            break
        free = draw > 0.8 and count <= 6
        wanted = _free_sizes(rng, width, height, count) if free else _sizes(rng, width, height, count)
        places = max(places, _scattered(rng, width, height, wanted), key=len)
    rng.shuffle(places)
    return places


def _sizes(rng: random.Random, width: int, height: int, count: int) -> list[tuple[float, int]]:
    """Diameters in pixels and indices of SIZES, big ones at least 1.4 times the small ones."""
    side, short = math.sqrt(width * height), min(width, height)
    small_low = max(16.0, 0.09 * side)
    small_high = max(small_low, min(0.12 * side, 0.3 * short))
    big_low = max(0.17 * side, 1.4 * small_high)
    big_high = max(big_low, min((0.24 if count < 7 else 0.2) * side, 0.55 * short))
    share = rng.choice((0.0, 0.5, 0.5, 0.5, 1.0))
    sizes = [int(rng.random() < share) for _ in range(count)]
    return [(rng.uniform(*((big_low, big_high) if size else (small_low, small_high))), size) for size in sizes]


def _free_sizes(rng: random.Random, width: int, height: int, count: int) -> list[tuple[float, int]]:
    """Any diameters, as in a stranger's drawing; a size's name only where it is clear."""
    side, short = math.sqrt(width * height), min(width, height)
    most = min(0.75 / math.sqrt(count) * side, 0.5 * side, 0.8 * short)
    least = max(16.0, 0.085 * side)
    wanted = []
    for _ in range(count):
        diameter = math.exp(rng.uniform(math.log(least), math.log(max(most, least))))
        share = diameter / side
        wanted.append((diameter, 0 if share <= 0.12 else 1 if share >= 0.17 and diameter > 22 else -1))
    return wanted


def _scattered(rng: random.Random, width: int, height: int, wanted: list[tuple[float, int]]) -> list[Place]:
    """Anywhere within the canvas, with a gap between any two; what finds no place is left out."""
    gap = max(4.0, 0.015 * math.sqrt(width * height))
    found: list[Place] = []
    for diameter, size in sorted(wanted, reverse=True):
        edge = diameter / 2 + 2
        for _ in range(60):
            x, y = rng.uniform(edge, width - edge), rng.uniform(edge, height - edge)
            if all(math.hypot(x - a, y - b) >= (diameter + d) / 2 + gap for a, b, d, _ in found):
                found.append((x, y, diameter, size))
                break
    return found


def _rows(rng: random.Random, width: int, height: int, wanted: list[tuple[float, int]]) -> list[Place]:
    """In one to three rows, as on shelves; empty if they do not fit so."""
    largest = max(diameter for diameter, _ in wanted)
    gap = max(4.0, 0.015 * math.sqrt(width * height))
    across, down = int(width // (largest + gap)), int(height // (largest + gap))
    fewest, most = -(-len(wanted) // max(across, 1)), min(down, 3, len(wanted))
    if across < 1 or fewest > most:
        return []
    rows = rng.randint(fewest, most)
    columns = rng.randint(-(-len(wanted) // rows), min(across, len(wanted)))
    cells = rng.sample([(r, c) for r in range(rows) for c in range(columns)], len(wanted))
    cell_w, cell_h = width / columns, height / rows
    standing = rng.random() < 0.5
    places: list[Place] = []
    for (row, column), (diameter, size) in zip(cells, wanted, strict=True):
        slack_x, slack_y = (cell_w - diameter - gap) / 2, (cell_h - diameter - gap) / 2
        x = (column + 0.5) * cell_w + rng.uniform(-0.6, 0.6) * slack_x
        y = (row + 0.5) * cell_h + (0.8 * slack_y if standing else rng.uniform(-0.3, 0.3) * slack_y)
        places.append((x, y, diameter, size))
    return places
