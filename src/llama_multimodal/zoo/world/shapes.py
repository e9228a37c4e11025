"""Draw one shape with smooth edges: a patch is drawn larger, scaled down and pasted."""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image, ImageDraw

from .palette import RGB, mix
from .types import COLORS, SHAPES

Points = list[tuple[float, float]]
# No tone of these turns into a neighbour's when it is shaded a little.
_SHADABLE = tuple(name in ("red", "green", "blue", "purple") for name in COLORS)
# How far each shape may be squeezed along one direction and still keep its name.
_SQUEEZE = {"circle": 0.95, "square": 0.94, "triangle": 0.8, "star": 0.9, "hexagon": 0.93, "cross": 0.9}


def draw_shape(
    rng: random.Random,
    image: Image.Image,
    x: float,
    y: float,
    diameter: float,
    shape: int,
    color: int,
    tone: RGB,
    *,
    upright: float = 0.3,
    flat: bool = False,
) -> None:
    """Draw SHAPES[shape] in `tone` within the circle of that diameter around (x, y), all in image pixels.

    upright: probability that it stands straight and regular. flat: neither shading nor a coloured edge.
    """
    fine = 4 if diameter < 60 else 3 if diameter < 150 else 2
    left, top = math.floor(x - diameter / 2) - 2, math.floor(y - diameter / 2) - 2
    side = math.ceil(diameter) + 5
    box = (left, top, left + side, top + side)
    outline = _outline(rng, SHAPES[shape], rng.random() < upright)
    center = ((x - left) * fine, (y - top) * fine)
    fill: Image.Image | RGB = tone
    if not flat and _SHADABLE[color] and rng.random() < 0.3:
        fill = _shaded(rng, tone, side)
    edge, share = None, 0.0
    draw = rng.random()
    if draw < (0.2 if flat else 0.3):
        # Of the radius; thin arms would vanish under an edge that a disc wears well.
        share = rng.uniform(0.04, 0.07 if SHAPES[shape] in ("cross", "star") else 0.12)
        if flat or draw < 0.12:
            edge = (0, 0, 0)
        else:
            edge = (255, 255, 255) if draw < 0.19 else mix(tone, (0, 0, 0), rng.uniform(0.35, 0.6))
    if edge is not None:
        image.paste(edge, box, _mask(outline, side, fine, center, diameter / 2, 0.0))
    image.paste(fill, box, _mask(outline, side, fine, center, diameter / 2, share))


def _shaded(rng: random.Random, tone: RGB, side: int) -> Image.Image:
    ramp = np.linspace(0.0, rng.uniform(0.06, 0.16), side)
    if rng.random() < 0.5:
        ramp = ramp[::-1]
    share = np.broadcast_to(ramp[:, None] if rng.random() < 0.5 else ramp, (side, side))[..., None]
    end = np.array((255, 255, 255) if rng.random() < 0.5 else (0, 0, 0))
    return Image.fromarray((np.array(tone) * (1 - share) + end * share).astype(np.uint8))


def _mask(
    outline: list[Points], side: int, fine: int, center: tuple[float, float], radius: float, inset: float
) -> Image.Image:
    """[side, side] coverage of the outline; inset: the share of the radius that an edge takes all around."""
    mask = Image.new("L", (side * fine, side * fine), 0)
    pen = ImageDraw.Draw(mask)
    for polygon in outline:
        points = _shrunk(polygon, inset) if inset else polygon
        pen.polygon([(center[0] + radius * fine * u, center[1] + radius * fine * v) for u, v in points], fill=255)
    return mask.reduce(fine)


def _shrunk(polygon: Points, inset: float) -> Points:
    """Every side moved inwards by `inset`; the corners are where the moved sides meet."""
    sides = []
    for (ax, ay), (bx, by) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        length = math.hypot(bx - ax, by - ay)
        nx, ny = -(by - ay) / length, (bx - ax) / length  # points inwards: corners go round in the same sense
        sides.append((nx, ny, nx * ax + ny * ay + inset))
    corners = []
    for (a, b, c), (d, e, f) in zip(sides[-1:] + sides[:-1], sides, strict=True):
        det = a * e - b * d
        corners.append(((c * e - b * f) / det, (a * f - c * d) / det))
    return corners


def _outline(rng: random.Random, name: str, straight: bool) -> list[Points]:
    """Polygons within the unit circle whose union is the shape, corners in the sense of growing angles (y down)."""
    if name == "circle":
        polygons = [_ring([1.0] * 48)]
    elif name == "star":
        inner = rng.uniform(0.38, 0.5)
        polygons = [_ring([1.0, inner] * 5)]
    elif name == "cross":
        arm = rng.uniform(0.22, 0.36)
        reach = math.sqrt(1 - arm * arm)
        polygons = [[(-a, -b), (a, -b), (a, b), (-a, b)] for a, b in ((reach, arm), (arm, reach))]
    else:
        polygons = [_ring([1.0] * {"square": 4, "triangle": 3, "hexagon": 6}[name])]
    squeeze = 1.0 if straight and rng.random() < 0.6 else rng.uniform(_SQUEEZE[name], 1.0)
    if straight:
        turn = {"square": math.pi / 4, "hexagon": rng.choice((0.0, math.pi / 6))}.get(name, -math.pi / 2)
        return [_squeezed(_turned(p, turn), squeeze, 0.0) for p in polygons]
    along = rng.choice((0.0, math.pi / 2)) if name == "cross" else rng.uniform(0, math.pi)
    turn = rng.uniform(0, 2 * math.pi)
    return [_turned(_squeezed(p, squeeze, along), turn) for p in polygons]


def _ring(radii: list[float]) -> Points:
    step = 2 * math.pi / len(radii)
    return [(r * math.cos(k * step), r * math.sin(k * step)) for k, r in enumerate(radii)]


def _turned(points: Points, angle: float) -> Points:
    cos, sin = math.cos(angle), math.sin(angle)
    return [(u * cos - v * sin, u * sin + v * cos) for u, v in points]


def _squeezed(points: Points, factor: float, along: float) -> Points:
    """Scaled by `factor` in the direction `along` (radians)."""
    if factor == 1.0:
        return points
    return _turned([(u * factor, v) for u, v in _turned(points, -along)], along)
