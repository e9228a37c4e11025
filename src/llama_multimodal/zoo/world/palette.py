"""Colours of drawn things: many tones for each colour name, none of which another name could claim."""

from __future__ import annotations

import colorsys
import random
from functools import lru_cache

RGB = tuple[int, int, int]

# One entry per name in COLORS: what a person picks from a palette for that colour.
_CANONICAL: tuple[tuple[RGB, ...], ...] = (
    ((255, 0, 0), (220, 20, 30), (237, 28, 36)),
    ((255, 165, 0), (255, 140, 0), (255, 127, 39)),
    ((255, 255, 0), (255, 225, 0), (255, 242, 0)),
    ((0, 128, 0), (0, 255, 0), (0, 170, 60), (34, 177, 76)),
    ((0, 0, 255), (30, 100, 255), (0, 112, 192), (63, 72, 204)),
    ((128, 0, 128), (150, 50, 220), (112, 48, 160), (163, 73, 164)),
    ((139, 69, 19), (120, 72, 40), (150, 75, 0), (128, 64, 0)),
    ((0, 0, 0), (0, 0, 0), (20, 20, 20)),
)
# Hue in degrees, saturation and value (HSV), each a range. Ranges of neighbouring names leave a gap: orange is
# light and vivid where brown is dark; red stays clear of brown by hue or by lightness.
_TONES: tuple[tuple[tuple[float, float], tuple[float, float], tuple[float, float]], ...] = (
    ((-10, 6), (0.75, 1.0), (0.70, 1.0)),
    ((23, 38), (0.80, 1.0), (0.90, 1.0)),
    ((50, 61), (0.62, 1.0), (0.90, 1.0)),
    ((92, 150), (0.52, 1.0), (0.36, 0.88)),
    ((203, 240), (0.55, 1.0), (0.50, 1.0)),
    ((270, 294), (0.50, 1.0), (0.42, 0.88)),
    ((17, 31), (0.55, 0.88), (0.30, 0.56)),
    ((0, 360), (0.0, 0.30), (0.0, 0.12)),
)


def object_color(rng: random.Random, color: int, vivid: float = 0.35) -> RGB:
    """A tone of the colour named COLORS[color]; with probability `vivid` one that paint programs offer."""
    if rng.random() < vivid:
        return rng.choice(_CANONICAL[color])
    hue, saturation, value = (rng.uniform(*limits) for limits in _TONES[color])
    return from_hsv(hue, saturation, value)


def tone_on(
    rng: random.Random, color: int, behind: tuple[RGB, ...], *, vivid: float = 0.35, tries: int = 8, least: float = 35.0
) -> RGB | None:
    """A tone of the colour that stands out from every colour behind it, None if none was found."""
    for _ in range(tries):
        tone = object_color(rng, color, vivid)
        if all(contrast(tone, other) >= least for other in behind):
            return tone
    return None


def from_hsv(hue: float, saturation: float, value: float) -> RGB:
    """8-bit RGB of a hue in degrees, a saturation and a value in 0..1."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """`a` moved towards `b` by `share` (0: a, 1: b)."""
    return (
        round(a[0] + (b[0] - a[0]) * share),
        round(a[1] + (b[1] - a[1]) * share),
        round(a[2] + (b[2] - a[2]) * share),
    )


def contrast(a: RGB, b: RGB) -> float:
    """CIELab distance of two colours: 0 for the same, 100 from black to white; above 30 is easy to see."""
    return sum((p - q) ** 2 for p, q in zip(_lab(a), _lab(b), strict=True)) ** 0.5


def lightness(color: RGB) -> float:
    """CIELab lightness, 0 for black to 100 for white."""
    return _lab(color)[0]


_LINEAR = tuple(v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in range(256))


@lru_cache(maxsize=1024)
def _lab(color: RGB) -> tuple[float, float, float]:
    red, green, blue = (_LINEAR[c] for c in color)
    x = _root((0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505)
    y = _root(0.2126 * red + 0.7152 * green + 0.0722 * blue)
    z = _root((0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def _root(t: float) -> float:
    return t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116
