"""Pictures with one printed word, number or code, and where each character of it is."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from . import fonts
from .backgrounds import Background, background, canvas_size, finish, thumbnail_size
from .outside import outside_question
from .palette import RGB, from_hsv, lightness, object_color
from .phrases import PHRASES, phrase
from .types import CHARS, COLORS, OUTSIDE_ANSWER, SHAPES, SIZES, Mark, Turn
from .words import WORDS

_ONSETS = tuple(
    "b c d f g h j k l m n p r s t v w z bl br ch cl cr dr fl fr gl gr pl pr sk sl sn sp st th tr".split()  # noqa: SIM905
)
_VOWELS = tuple("a e i o u a e i o ai ea ee oa oo ou y".split())  # noqa: SIM905
_CODAS = ("", "", "", *"b d g k l m n p r s t x nd rd rk st mp".split())  # noqa: SIM905
_CODE = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # without the look-alikes O, 0, I and 1
_SINGLE = "ABCDEFGHJKLMNPQRSTUVWXYZabdefghijmnqrty23456789"  # case can be told without a neighbour
_CASELESS = set("cosuvwxzpk")  # small and capital look the same but for their height
_LENGTHS = (0.03, 0.05, 0.15, 0.18, 0.18, 0.16, 0.13, 0.12)  # of one to eight characters
_LEAST_CONTRAST = 28.0  # of lightness: thin strokes are not read by their hue
_BY_LENGTH = {n: tuple(word for word in WORDS if len(word) == n) for n in range(2, 9)}
# A capitalised word that begins a question may be one token; printed ones must be spelt letter by letter.
_OPENINGS = (
    {*COLORS, *SHAPES, *SIZES}
    | {template.split()[0].strip(".,:").lower() for group in PHRASES.values() for template in group}
    | {"please", "answer", "just", "yes", "one", "write", "tell", "play", "set", "send", "book", "fix", "good"}
)


@dataclass(frozen=True)
class Printed:
    """What is printed, on how large a picture (pixels)."""

    width: int
    height: int
    text: str


def plan_printed(rng: random.Random, small: float = 0.0) -> Printed:
    """Canvas 120 to 1200 pixels a side, mostly wider than high; 1 to 8 characters; small: see `sample`."""
    draw = rng.random()
    width, height = canvas_size(rng, (1, 2.2) if draw < 0.65 else (2.2, 6) if draw < 0.85 else (1, 3))
    if rng.random() < 0.08 + small:
        width, height = thumbnail_size(rng)
    if draw >= 0.85:
        width, height = height, width
    return Printed(width, height, random_text(rng, 5 if width < height / 1.6 else 8))


def random_text(rng: random.Random, most: int = 8) -> str:
    """A word, pseudo-word, number or code of at most `most` characters."""
    (length,) = rng.choices(range(1, most + 1), _LENGTHS[:most])
    if length == 1:
        return rng.choice(_SINGLE)
    kind = rng.random()
    if kind < 0.42:
        return _cased(rng, rng.choice(_BY_LENGTH[length]))
    if kind < 0.66:
        word = ""
        while len(word) < length:
            word += rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        return _cased(rng, word[:length])
    if kind < 0.84:
        return str(rng.randint(10 ** (length - 1), 10**length - 1))
    return "".join(rng.choices(_CODE, k=length))


def _cased(rng: random.Random, word: str) -> str:
    if set(word) <= _CASELESS:
        return word.capitalize()
    style = rng.randrange(3)
    if style == 2 and word in _OPENINGS:
        style = rng.randrange(2)
    return (word.upper(), word, word.capitalize())[style]


def printed_turns(rng: random.Random, text: str, count: int) -> tuple[Turn, ...]:
    """The question what is printed, in two ways at most, perhaps with one that has no answer here."""
    turns = [Turn(_reading(rng, text), text, "text") for _ in range(min(2, count))]
    if count > 2 and rng.random() < 0.12:
        turns.insert(rng.randrange(3), Turn(outside_question(rng, "text"), OUTSIDE_ANSWER, "outside"))
    return tuple(turns)


def _reading(rng: random.Random, text: str) -> str:
    form = "text"
    if text.isdigit() and rng.random() < 0.6:
        form = "text_number"
    elif not text.isalpha() and not text.isdigit() and rng.random() < 0.3:
        form = "text_code"
    while True:
        question = phrase(rng, form)
        if "word" not in question or (text.isalpha() and len(text) > 1):
            return question


def paint_printed(rng: random.Random, plan: Printed) -> tuple[Image.Image, tuple[Mark, ...]]:
    """The picture, and a mark at the centre of each character as it is printed, rotation included."""
    width, height, text = plan.width, plan.height, plan.text
    behind = background(rng, width, height, "paper" if rng.random() < 0.4 else "calm")
    ink = readable_ink(rng, behind)
    angle = math.radians(rng.uniform(-5, 5)) if rng.random() < 0.6 else 0.0
    cos, sin = math.cos(angle), abs(math.sin(angle))
    face = fonts.pick_face(rng)
    spacing = rng.uniform(0.02, 0.14) if rng.random() < 0.4 else 0.02  # in units of the font size

    # The largest size that fits, found from a measure at 100 pixels: outlines scale linearly but for hinting.
    row = Row(text, face, 100, spacing)
    across, down = (row.width * cos + row.height * sin) / 100, (row.height * cos + row.width * sin) / 100
    size = min(rng.uniform(0.5, 0.92) * width / across, rng.uniform(0.55, 0.85) * height / down)
    least = min(12.0, 0.92 * width / across, 0.85 * height / down)  # below 12 pixels letters melt: take more width
    row = Row(text, face, max(7, int(max(size, least))), spacing)

    mask = row.draw(angle)
    # Anywhere, but with a margin where there is room for one.
    slack_x, slack_y = max(0.0, 0.97 * width - mask.width), max(0.0, 0.95 * height - mask.height)
    left = round((width - mask.width) / 2 + rng.uniform(-0.5, 0.5) * slack_x)
    top = round((height - mask.height) / 2 + rng.uniform(-0.5, 0.5) * slack_y)
    image = behind.paint()
    image.paste(ink, (left, top), mask)
    marks = row.marks((left + mask.width / 2, top + mask.height / 2), angle)
    return finish(rng, image), marks


class Row:
    """Characters of one face set side by side: where each stands, in pixels from the origin of the first."""

    _PAD = 3

    def __init__(self, text: str, face: str, size: int, spacing: float) -> None:
        self.text, self.font = text, fonts.load(face, size)
        at, self.starts, self.boxes = 0.0, [], []
        for char in text:
            box = self.font.getbbox(char)
            self.starts.append(at)
            self.boxes.append((at + box[0], box[1], at + box[2], box[3]))
            at += self.font.getlength(char) + spacing * size
        self.left, self.right = min(b[0] for b in self.boxes), max(b[2] for b in self.boxes)
        self.top, self.bottom = min(b[1] for b in self.boxes), max(b[3] for b in self.boxes)
        self.width, self.height = self.right - self.left, self.bottom - self.top

    def draw(self, angle: float = 0.0) -> Image.Image:
        """Coverage of the characters, with a little room around, turned anticlockwise by `angle` (radians)."""
        mask = Image.new("L", (math.ceil(self.width) + 2 * self._PAD, math.ceil(self.height) + 2 * self._PAD))
        pen = ImageDraw.Draw(mask)
        for char, start in zip(self.text, self.starts, strict=True):
            pen.text((start - self.left + self._PAD, self._PAD - self.top), char, font=self.font, fill=255)
        if angle:
            mask = mask.rotate(math.degrees(angle), resample=Image.Resampling.BICUBIC, expand=True)
        return mask

    def marks(self, middle: tuple[float, float], angle: float = 0.0) -> tuple[Mark, ...]:
        """A mark for each character where `draw`'s picture is centred on `middle`, in pixels."""
        half_w, half_h = math.ceil(self.width) / 2, math.ceil(self.height) / 2
        marks = []
        for index, (char, (left, top, right, bottom)) in enumerate(zip(self.text, self.boxes, strict=True)):
            dx, dy = (left + right) / 2 - self.left - half_w, (top + bottom) / 2 - self.top - half_h
            # Anticlockwise on the screen, where y points down.
            x = middle[0] + dx * math.cos(angle) + dy * math.sin(angle)
            y = middle[1] - dx * math.sin(angle) + dy * math.cos(angle)
            box = (x - (right - left) / 2, y - (bottom - top) / 2, x + (right - left) / 2, y + (bottom - top) / 2)
            marks.append(Mark("char", x, y, box, char=CHARS.index(char), index=index))
        return tuple(marks)


def readable_ink(rng: random.Random, behind: Background) -> RGB:
    """A colour that can be read on the background: mostly dark on light or light on dark, often coloured."""
    best: tuple[float, RGB] = (-1.0, (0, 0, 0))
    for attempt in range(12):
        draw = rng.random()
        if attempt >= 10:
            color = ((0, 0, 0), (255, 255, 255))[attempt - 10]
        elif draw < 0.45:
            color = object_color(rng, rng.randrange(len(COLORS)))
        elif draw < 0.75:
            color = from_hsv(rng.uniform(0, 360), rng.uniform(0, 0.6), rng.uniform(0, 0.4))
        else:
            color = from_hsv(rng.uniform(0, 360), rng.uniform(0, 0.3), rng.uniform(0.85, 1.0))
        score = min(abs(lightness(color) - lightness(other)) for other in behind.colors)
        if score >= _LEAST_CONTRAST:
            return color
        best = max(best, (score, color))
    return best[1]
