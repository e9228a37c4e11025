"""Pictures with one printed word, number or code, and where each character of it is."""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from llama_multimodal.zoo.world import fonts
from llama_multimodal.zoo.world.backgrounds import background, finish
from llama_multimodal.zoo.world.palette import contrast, object_color
from llama_multimodal.zoo.world.streams import plain
from llama_multimodal.zoo.world.types import CHARS, COLORS, Mark
from llama_multimodal.zoo.world.words import WORDS

_ONSETS = (*"bcdfghjklmnprstvwz", "bl", "br", "ch", "cl", "cr", "dr", "fl", "gr", "pl", "sh", "sk", "st", "tr")
_VOWELS = (*"aeiouaeio", "ai", "ea", "ee", "oa", "oo", "ou")
_CODAS = ("", "", "", *"bdgklmnprstx", "ck", "nd", "nt", "rd", "rk", "st")
_CODE_CHARS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # without the look-alikes O, 0, I, l and 1
_SINGLES = "ABDEFGHJKLMNQRTYabdefghijmnqrty23456789"  # characters that nothing else looks like when alone
_LENGTHS = np.array([0.03, 0.05, 0.15, 0.19, 0.18, 0.16, 0.13, 0.11])  # of one to eight characters
_MIN_CONTRAST = 40.0  # CIELab distance


def _cased(rng: np.random.Generator, word: str) -> str:
    # Without another letter beside them, these look the same in both cases.
    style = 1 if set(word) <= set("cosvwxz") else int(rng.integers(3))
    return (word.upper(), word.capitalize(), word)[style]


def _pseudo(rng: np.random.Generator, length: int) -> str:
    word = ""
    while len(word) < length:
        for parts in (_ONSETS, _VOWELS, _CODAS):
            word += parts[int(rng.integers(len(parts)))]
    return word[:length]


def random_text(rng: np.random.Generator, max_length: int = 8) -> str:
    """A word, pseudo-word, number or code of at most `max_length` characters."""
    weights = _LENGTHS[:max_length] / _LENGTHS[:max_length].sum()
    length = 1 + int(rng.choice(max_length, p=weights))
    kind = rng.random()
    if length == 1:
        return _SINGLES[int(rng.integers(len(_SINGLES)))]
    if kind < 0.42:
        words = _BY_LENGTH[length]
        return _cased(rng, words[int(rng.integers(len(words)))])
    if kind < 0.66:
        return _cased(rng, _pseudo(rng, length))
    if kind < 0.82:
        return str(int(rng.integers(1, 10))) + "".join(str(int(d)) for d in rng.integers(0, 10, length - 1))
    return "".join(_CODE_CHARS[int(i)] for i in rng.integers(0, len(_CODE_CHARS), length))


_BY_LENGTH = {n: tuple(word for word in WORDS if len(word) == n) for n in range(2, 9)}


def canvas_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height between 120 and 1200 pixels, mostly wider than high."""
    long_side = round(math.exp(rng.uniform(math.log(160), math.log(1200))))
    shape = rng.random()
    ratio = rng.uniform(1.0, 2.0) if shape < 0.72 else rng.uniform(2.0, 4.0)
    short_side = max(120, round(long_side / ratio))
    long_side = max(long_side, short_side)
    return (short_side, long_side) if rng.random() < 0.12 else (long_side, short_side)


def _legibility(ink: tuple[int, int, int], ground: tuple[int, int, int]) -> float:
    """Contrast, where a difference in hue alone counts for little."""
    (r, g, b), (r2, g2, b2) = ink, ground
    light = abs(0.3 * (r - r2) + 0.59 * (g - g2) + 0.11 * (b - b2))
    return min(contrast(ink, ground), 0.8 * light)


def _ink(rng: random.Random, ground: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    best, best_score = (0, 0, 0), -1.0
    for attempt in range(8):
        if attempt < 5 and rng.random() < 0.6:
            color = object_color(rng, rng.randrange(len(COLORS)))
        elif rng.random() < 0.5:
            color = (rng.randrange(60), rng.randrange(60), rng.randrange(60))
        else:
            color = (rng.randrange(205, 256), rng.randrange(205, 256), rng.randrange(205, 256))
        score = min(_legibility(color, g) for g in ground)
        if score >= _MIN_CONTRAST:
            return color
        if score > best_score:
            best, best_score = color, score
    for color in ((0, 0, 0), (255, 255, 255)):
        score = min(_legibility(color, g) for g in ground)
        if score > best_score:
            best, best_score = color, score
    return best


def printed(rng: np.random.Generator) -> tuple[Image.Image, tuple[Mark, ...], str]:
    """A picture of one text, a mark for each character of it, and the text."""
    width, height = canvas_size(rng)
    text = random_text(rng, 5 if width < height / 1.6 else 8)
    draws = plain(rng)
    behind = background(draws, width, height, "paper" if draws.random() < 0.35 else "calm")
    image, ground = behind.paint(), list(behind.colors)
    image = image.convert("RGB")
    angle = math.radians(float(rng.uniform(-5, 5))) if rng.random() < 0.6 else 0.0
    cos, sin = math.cos(angle), math.sin(angle)
    face = fonts.pick_face(rng)
    spacing = float(rng.uniform(0.0, 0.14)) if rng.random() < 0.4 else 0.02

    # Sizes are measured at 100 pixels and scaled: they are linear to well within a pixel of slack.
    def measure(size: int) -> tuple[float, float, float, float, list[float], list[float]]:
        type_face = fonts.load(face, size)
        pen, starts, boxes = 0.0, [], []
        for char in text:
            starts.append(pen)
            boxes.append(type_face.getbbox(char))
            pen += type_face.getlength(char) + spacing * size
        lefts = [s + b[0] for s, b in zip(starts, boxes, strict=True)]
        rights = [s + b[2] for s, b in zip(starts, boxes, strict=True)]
        centers = [(a + b) / 2 for a, b in zip(lefts, rights, strict=True)]
        return min(lefts), max(rights), min(b[1] for b in boxes), max(b[3] for b in boxes), starts, centers

    left, right, top, bottom, _, _ = measure(100)
    span_w, span_h = (right - left) / 100, (bottom - top) / 100
    share = float(rng.uniform(0.50, 0.92))
    outer_w = span_w * cos + span_h * abs(sin)
    outer_h = span_h * cos + span_w * abs(sin)
    size = int(min(share * width / outer_w, float(rng.uniform(0.6, 0.88)) * height / outer_h))
    left, right, top, bottom, starts, centers = measure(max(8, size))
    type_face = fonts.load(face, max(8, size))
    w, h = right - left, bottom - top
    outer_w, outer_h = w * cos + h * abs(sin), h * cos + w * abs(sin)
    slack_x, slack_y = max(0.0, width - outer_w - 4) / 2, max(0.0, height - outer_h - 4) / 2
    mid_x = width / 2 + float(rng.uniform(-1, 1)) * slack_x
    mid_y = height / 2 + float(rng.uniform(-1, 1)) * slack_y

    pad = 3
    mask = Image.new("L", (math.ceil(w) + 2 * pad, math.ceil(h) + 2 * pad), 0)
    pen = ImageDraw.Draw(mask)
    for char, start in zip(text, starts, strict=True):
        pen.text((start - left + pad, pad - top), char, font=type_face, fill=255)
    mask_turned = mask.rotate(math.degrees(angle), resample=Image.Resampling.BICUBIC, expand=True) if angle else mask
    corner = (round(mid_x - mask_turned.width / 2), round(mid_y - mask_turned.height / 2))
    mid_x, mid_y = corner[0] + mask_turned.width / 2, corner[1] + mask_turned.height / 2
    color = _ink(draws, ground)
    image.paste(color, corner, mask_turned)
    if rng.random() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, min(1.2, 0.02 * size + 0.2)))))
    image = finish(draws, image)

    marks = []
    for index, (char, center) in enumerate(zip(text, centers, strict=True)):
        box = type_face.getbbox(char)
        dx = center - left + pad - mask.width / 2
        dy = (box[1] + box[3]) / 2 - top + pad - mask.height / 2
        x, y = mid_x + dx * cos + dy * sin, mid_y - dx * sin + dy * cos
        x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
        marks.append(Mark("char", x, y, char=CHARS.index(char), index=index))
    return image, tuple(marks), text
