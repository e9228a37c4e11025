"""What pictures are drawn on, and the wear they get afterwards.

A background is chosen first and painted later, so that texts can be made without pictures. Textures are made small and
scaled up, or tiled, for speed.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from .palette import RGB, from_hsv, mix

Style = Literal["paper", "calm", "any"]


@dataclass(frozen=True)
class Background:
    """colors: the main colours, which whatever is drawn must stand out from. paint: makes the picture."""

    colors: tuple[RGB, ...]
    paint: Callable[[], Image.Image]


def canvas_size(
    rng: random.Random, ratio_limits: tuple[float, float], least: int = 120, most: int = 1200
) -> tuple[int, int]:
    """(long, short) side in pixels: the ratio is log-uniform in the limits, then so is the size within least..most."""
    ratio = math.exp(rng.uniform(math.log(ratio_limits[0]), math.log(ratio_limits[1])))
    side = math.exp(rng.uniform(math.log(least * math.sqrt(ratio)), math.log(most / math.sqrt(ratio))))
    long, short = side * math.sqrt(ratio), side / math.sqrt(ratio)
    return min(max(round(long), least), most), min(max(round(short), least), most)


def thumbnail_size(rng: random.Random) -> tuple[int, int]:
    """(long, short) side of a picture that fits a tile of 128 pixels, or two side by side: rare among all sizes."""
    short = rng.randint(120, 128)
    return (rng.randint(short, 128) if rng.random() < 0.35 else rng.randint(129, 256)), short


def background(rng: random.Random, width: int, height: int, style: Style) -> Background:
    """A background of that size. paper: plain and light; calm: nothing busier than a gradient or faint grain."""
    if style == "paper":
        return _plain(width, height, (255, 255, 255) if rng.random() < 0.6 else _paper(rng))
    color = _muted(rng)
    if rng.random() < 0.25:
        return _plain(width, height, color)
    makers = _CALM if style == "calm" else _ANY
    return rng.choice(makers)(rng, width, height, color)


def finish(rng: random.Random, image: Image.Image) -> Image.Image:
    """The picture as a camera or a copy would leave it; half of the time unchanged."""
    draw = rng.random()
    if draw < 0.5:
        return image
    if draw < 0.64:
        limit = 0.5 + 0.002 * math.sqrt(image.width * image.height)
        return image.filter(ImageFilter.BoxBlur(rng.uniform(0.2, limit)))
    if draw < 0.86:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(35, 92))
        return Image.open(buffer).convert("RGB")
    return _add_noise(rng.getrandbits(32), image, rng.randint(3, 14))


def _paper(rng: random.Random) -> RGB:
    return from_hsv(rng.uniform(0, 360), rng.uniform(0, 0.1), rng.uniform(0.9, 1.0))


def _muted(rng: random.Random) -> RGB:
    """A colour that is not one of the things' colours: pale, greyish or dark."""
    hue, draw = rng.uniform(0, 360), rng.random()
    if draw < 0.55:
        return from_hsv(hue, rng.uniform(0, 0.22), rng.uniform(0.78, 1.0))
    if draw < 0.8:
        return from_hsv(hue, rng.uniform(0, 0.25), rng.uniform(0.42, 0.78))
    return from_hsv(hue, rng.uniform(0, 0.35), rng.uniform(0.08, 0.33))


def _near(rng: random.Random, color: RGB, low: float, high: float) -> RGB:
    """A darker neighbour of a light colour, a lighter one of a dark colour."""
    return mix(color, (0, 0, 0) if sum(color) > 380 else (255, 255, 255), rng.uniform(low, high))


def _add_noise(seed: int, image: Image.Image, strength: int) -> Image.Image:
    """Uniform noise of +-strength, the same on the three channels, tiled from a patch."""
    width, height = image.size
    patch = np.random.default_rng(seed).integers(
        -strength, strength + 1, (min(height, 256), min(width, 256)), dtype=np.int16
    )
    noise = np.tile(patch, (-(-height // patch.shape[0]), -(-width // patch.shape[1])))[:height, :width, None]
    pixels = np.asarray(image) + noise  # [H, W, 3] int16
    np.clip(pixels, 0, 255, out=pixels)
    return Image.fromarray(pixels.astype(np.uint8))


def _blend(share: npt.NDArray[np.float64], a: RGB, b: RGB) -> Image.Image:
    """A picture that is `a` where share [H, W] is 0 and `b` where it is 1."""
    pixels = np.array(a) + share[..., None] * (np.array(b) - np.array(a))
    return Image.fromarray(pixels.astype(np.uint8))


def _plain(width: int, height: int, color: RGB) -> Background:
    return Background((color,), lambda: Image.new("RGB", (width, height), color))


def _gradient(rng: random.Random, width: int, height: int, color: RGB) -> Background:
    other = _near(rng, color, 0.12, 0.4)
    a, b, radial = rng.uniform(-1, 1), rng.uniform(-1, 1), rng.random() < 0.25

    def paint() -> Image.Image:
        y, x = np.mgrid[0:1:24j, 0:1:24j]
        share = np.hypot(x - abs(a), y - abs(b)) if radial else a * x + b * y
        share = (share - share.min()) / (np.ptp(share) + 1e-6)
        return _blend(share, color, other).resize((width, height), Image.Resampling.BILINEAR)

    return Background((color, mix(color, other, 0.5), other), paint)


def _grain(rng: random.Random, width: int, height: int, color: RGB) -> Background:
    seed, strength = rng.getrandbits(32), rng.randint(3, 10)
    return Background((color,), lambda: _add_noise(seed, Image.new("RGB", (width, height), color), strength))


def _noise(rng: random.Random, width: int, height: int, color: RGB) -> Background:
    seed, strength, scale = rng.getrandbits(32), rng.randint(10, 28), rng.choice((2, 3, 4))

    def paint() -> Image.Image:
        small = Image.new("RGB", (width // scale, height // scale), color)
        return _add_noise(seed, small, strength).resize((width, height), Image.Resampling.BILINEAR)

    return Background((color,), paint)


def _blotches(rng: random.Random, width: int, height: int, color: RGB) -> Background:
    other = _near(rng, color, 0.08, 0.28)
    seed, cells = rng.getrandbits(32), rng.randint(4, 14)

    def paint() -> Image.Image:
        longest = max(width, height)
        shape = (max(2, cells * height // longest), max(2, cells * width // longest))
        share = np.random.default_rng(seed).random(shape)
        return _blend(share, color, other).resize((width, height), Image.Resampling.BICUBIC)

    return Background((color, mix(color, other, 0.5), other), paint)


def _stripes(rng: random.Random, width: int, height: int, color: RGB) -> Background:
    other = _near(rng, color, 0.06, 0.22)
    step = max(4, int(math.sqrt(width * height) * rng.uniform(0.02, 0.12)))
    thick = max(1, int(step * rng.uniform(0.1, 0.6)))
    slant = rng.choice((None, 0.0, rng.uniform(-1.0, 1.0)))

    def paint() -> Image.Image:
        image = Image.new("RGB", (width, height), color)
        pen = ImageDraw.Draw(image)
        if slant is None:
            for y in range(0, height, step):
                pen.rectangle((0, y, width, y + thick - 1), fill=other)
        else:
            lean = int(slant * height)
            for x in range(-abs(lean), width + abs(lean), step):
                pen.line((x, 0, x + lean, height), fill=other, width=thick)
        return image

    return Background((color, other), paint)


def _checks(rng: random.Random, width: int, height: int, color: RGB) -> Background:
    other = _near(rng, color, 0.06, 0.2)
    step = max(4, int(math.sqrt(width * height) * rng.uniform(0.03, 0.12)))
    ruled = rng.random() < 0.5  # like a page of squared paper

    def paint() -> Image.Image:
        if ruled:
            image = Image.new("RGB", (width, height), color)
            pen = ImageDraw.Draw(image)
            for x in range(0, width, step):
                pen.line((x, 0, x, height), fill=other)
            for y in range(0, height, step):
                pen.line((0, y, width, y), fill=other)
            return image
        odd = np.add.outer(np.arange(-(-height // step)), np.arange(-(-width // step))) % 2.0
        small = _blend(odd, color, other)
        full = small.resize((small.width * step, small.height * step), Image.Resampling.NEAREST)
        return full.crop((0, 0, width, height))

    return Background((color, other), paint)


def _dots(rng: random.Random, width: int, height: int, color: RGB) -> Background:
    # Kept tiny and faint next to a thing, so that a dot is never counted as a circle.
    other = _near(rng, color, 0.06, 0.18)
    side = math.sqrt(width * height)
    step = max(6, int(side * rng.uniform(0.03, 0.06)))
    radius = max(1, int(min(step * 0.25, side * 0.012)))

    def paint() -> Image.Image:
        tile = Image.new("RGB", (step, step), color)
        middle = step // 2
        ImageDraw.Draw(tile).ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill=other)
        pixels = np.tile(np.asarray(tile), (-(-height // step), -(-width // step), 1))[:height, :width]
        return Image.fromarray(np.ascontiguousarray(pixels))

    return Background((color, other), paint)


def _shelf(rng: random.Random, width: int, height: int, color: RGB) -> Background:
    """Boards of pale, grey or dark wood: grain along them, darker lines between them."""
    wood = from_hsv(rng.uniform(22, 42), rng.uniform(0.1, 0.42), rng.choice((rng.uniform(0.72, 0.97), 0.22)))
    grain = _near(rng, wood, 0.06, 0.18)
    line = _near(rng, wood, 0.25, 0.5)
    seed, boards = rng.getrandbits(32), rng.randint(1, 6)
    thick = max(1, round(height * rng.uniform(0.005, 0.02)))

    def paint() -> Image.Image:
        share = np.random.default_rng(seed).random((min(height, 96), max(2, min(width, 96) // 6)))
        image = _blend(share, wood, grain).resize((width, height), Image.Resampling.BILINEAR)
        pen = ImageDraw.Draw(image)
        for board in range(1, boards + 1):
            bottom = round(board * height / boards)
            pen.rectangle((0, bottom - thick, width, bottom - 1), fill=line)
        return image

    return Background((wood, mix(wood, grain, 0.5), grain), paint)


_Maker = Callable[[random.Random, int, int, RGB], Background]
_CALM: tuple[_Maker, ...] = (_gradient, _grain, _grain, _blotches)
_ANY: tuple[_Maker, ...] = (
    _gradient, _gradient, _grain, _noise, _stripes, _checks, _dots, _shelf, _shelf, _blotches,
)  # fmt: skip
