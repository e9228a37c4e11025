"""One sample of the world for a seed: a picture, questions about it with their answers, and where things are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal

import numpy as np

from .charts import chart_turns, paint_chart, plan_chart
from .outside import unseen_question
from .printed import paint_printed, plan_printed, printed_turns
from .questions import scene_turns
from .scenes import paint_scene, plan_scene
from .sheets import paint_sheet
from .types import NO_PICTURE_ANSWER, Family, Sample, Split, Turn

FAMILIES: tuple[Family, ...] = ("scene", "text", "chart", "none", "sheet")
_SHARES = (0.60, 0.20, 0.17, 0.03, 0.0)  # a sheet comes only where it is asked for
_STREAMS = {"train": 0, "heldout": 1, "corpus": 2}


def sample(
    seed: int, *, split: Split = "train", family: str | None = None, turns: int = 8, small: float = 0.0
) -> Sample:
    """The sample of a seed: the same arguments give the same bytes; no two splits share a random stream.

    family: one of FAMILIES; None draws one. turns: the most questions there are about the picture (a printed text
    has 3 at most, a conversation without a picture 2). small: share of scenes and texts that are made to fit one tile
    of 128 pixels or two, beyond those that do anyway: a training run learns more from a small picture's pixels.

    Raises:
        MissingExtraError: text is to be drawn and the fonts are not installed.
        ValueError: no such family or split.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"unknown split {split!r}: train or heldout")
    rng, kind = _start(seed, split, family)
    if kind == "scene":
        scene = plan_scene(rng, small)
        asked = scene_turns(rng, scene, turns)
        return Sample(paint_scene(rng, scene), asked, scene.marks, kind)
    if kind == "text":
        printed = plan_printed(rng, small)
        asked = printed_turns(rng, printed.text, turns)
        image, marks = paint_printed(rng, printed)
        return Sample(image, asked, marks, kind)
    if kind == "chart":
        chart = plan_chart(rng)
        asked = chart_turns(rng, chart, turns)
        image, marks = paint_chart(rng, chart)
        return Sample(image, asked, marks, kind)
    if kind == "sheet":
        image, marks = paint_sheet(rng)
        return Sample(image, (), marks, kind)
    return Sample(None, _unseen_turns(rng, turns), (), kind)


def corpus(n: int, seed: int) -> Iterator[str]:
    """Questions and answers of `n` samples, without painting them, to choose a vocabulary from.

    Printed texts are left out: they are to be spelt, whatever words they are.
    """
    for index in range(n):
        rng, kind = _start(seed * n + index, "corpus", None)
        if kind == "scene":
            turns = scene_turns(rng, plan_scene(rng), 8)
        elif kind == "text":
            turns = printed_turns(rng, plan_printed(rng).text, 8)
        elif kind == "chart":
            turns = chart_turns(rng, plan_chart(rng), 8)
        else:
            turns = _unseen_turns(rng, 8)
        for turn in turns:
            yield turn.question
            if turn.kind != "text":
                yield turn.answer


def _start(
    seed: int, stream: Literal["train", "heldout", "corpus"], family: str | None
) -> tuple[random.Random, Family]:
    """The random stream of a seed and the family it draws."""
    # NumPy mixes the two numbers well; Python's generator is several times faster for the many scalars drawn here.
    rng = random.Random(int.from_bytes(np.random.default_rng([_STREAMS[stream], seed]).bytes(32), "little"))
    (drawn,) = rng.choices(FAMILIES, _SHARES)
    if family is None:
        return rng, drawn
    for known in FAMILIES:
        if family == known:
            return rng, known
    raise ValueError(f"unknown family {family!r}: one of {', '.join(FAMILIES)}")


def _unseen_turns(rng: random.Random, count: int) -> tuple[Turn, ...]:
    many = min(count, rng.randint(1, 2))
    return tuple(Turn(unseen_question(rng), NO_PICTURE_ANSWER, "outside") for _ in range(many))
