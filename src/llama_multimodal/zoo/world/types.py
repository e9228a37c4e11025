"""The words of the embedded model's small world, and what one rendered sample holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import Image

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
SHAPES = ("circle", "square", "triangle", "star", "hexagon", "cross")
SIZES = ("small", "big")
CHARS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
KINDS = (
    "count_all",
    "count_color",
    "count_shape",
    "count_both",
    "color",
    "shape",
    "existence",
    "place",
    "relation",
    "description",
    "text",
    "chart_highest",
    "chart_lowest",
    "chart_value",
    "outside",
)
OUTSIDE_ANSWER = "I can only answer about shapes, printed words and bar charts in a picture."
NO_PICTURE_ANSWER = "Please show me a picture of shapes, a printed word or a bar chart."

Family = Literal["scene", "text", "chart", "none", "sheet"]
Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Mark:
    """Where a thing is in the picture: supervision for the vision encoder. Fields that do not apply are -1.

    x, y: centre in image pixels (a bar: the middle of its upper edge).
    box: left, top, right, bottom of what it covers, in image pixels.
    shape, color, size, char: indices into SHAPES, COLORS, SIZES and CHARS.
    size is -1 for a thing that is neither clearly small nor clearly big.
    index: place of a character in its word, or of a bar (and of the letter under it) in its chart, from 0.
    """

    kind: Literal["object", "char", "bar"]
    x: float
    y: float
    box: tuple[float, float, float, float]
    shape: int = -1
    color: int = -1
    size: int = -1
    char: int = -1
    index: int = -1
    value: int = -1


@dataclass(frozen=True)
class Mention:
    """Words of a question that name one thing: "small red circle", and the thing."""

    words: str
    mark: Mark


@dataclass(frozen=True)
class Turn:
    """One question about the picture and its canonical answer.

    mentions: the things that its words name, one each: supervision for the decoder.
    """

    question: str
    answer: str
    kind: str
    mentions: tuple[Mention, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A picture (None: a conversation without one) and turns about it."""

    image: Image.Image | None
    turns: tuple[Turn, ...]
    marks: tuple[Mark, ...]
    family: Family
