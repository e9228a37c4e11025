"""The small world that the embedded model is trained and tested on: coloured shapes, printed words, bar charts."""

from .questions import count_matching
from .sample import FAMILIES, corpus, sample
from .types import (
    CHARS,
    COLORS,
    KINDS,
    NO_PICTURE_ANSWER,
    OUTSIDE_ANSWER,
    SHAPES,
    SIZES,
    Mark,
    Mention,
    Sample,
    Turn,
)

__all__ = [
    "CHARS",
    "COLORS",
    "FAMILIES",
    "KINDS",
    "NO_PICTURE_ANSWER",
    "OUTSIDE_ANSWER",
    "SHAPES",
    "SIZES",
    "Mark",
    "Mention",
    "Sample",
    "Turn",
    "corpus",
    "count_matching",
    "sample",
]
