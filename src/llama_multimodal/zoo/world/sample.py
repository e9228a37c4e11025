"""One rendered sample of the small world, as a pure function of its split and seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from llama_multimodal.zoo.world import questions
from llama_multimodal.zoo.world.charts import chart, chart_data
from llama_multimodal.zoo.world.printed import printed, random_text
from llama_multimodal.zoo.world.scene_questions import scene_turns
from llama_multimodal.zoo.world.scenes import paint_scene, plan_scene
from llama_multimodal.zoo.world.streams import plain
from llama_multimodal.zoo.world.types import COLORS, SHAPES, SIZES, Mark, Sample, Turn

Family = Literal["scene", "text", "chart", "none"]
SPLITS = {"train": 0, "val": 1, "test": 2}
FAMILIES: tuple[Family, ...] = ("scene", "text", "chart", "none")
FAMILY_SHARES = (0.58, 0.22, 0.17, 0.03)
_OUTSIDE_SHARE = 0.05
_CORPUS_SPLIT = 1000  # a stream of its own, apart from every split


def _pick_family(rng: np.random.Generator) -> Family:
    return FAMILIES[int(rng.choice(len(FAMILIES), p=FAMILY_SHARES))]


def _with_outside(rng: np.random.Generator, turns: list[Turn], limit: int) -> list[Turn]:
    """Puts questions outside the world among the turns: about one turn in twenty."""
    turns = list(turns[:limit])
    extra = int(rng.binomial(max(1, len(turns)), _OUTSIDE_SHARE))
    for _ in range(extra):
        turn = questions.outside_turn(rng)
        if len(turns) < limit:
            turns.insert(int(rng.integers(len(turns) + 1)), turn)
        else:
            turns[int(rng.integers(len(turns)))] = turn
    return turns


def _no_picture_turns(rng: np.random.Generator, turns: int) -> list[Turn]:
    n = min(turns, int(rng.integers(1, 4)))
    return [questions.no_picture_turn(rng) for _ in range(n)]


def sample(seed: int, *, split: str = "train", family: Family | None = None, turns: int = 8) -> Sample:
    """The sample with this seed. Equal arguments give equal samples; splits never share a random stream.

    turns: at most this many questions about the picture.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if family is not None and family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: use one of {', '.join(FAMILIES)}")
    rng = np.random.default_rng([SPLITS[split], seed])
    drawn = _pick_family(rng)
    family = drawn if family is None else family
    if family == "none":
        return Sample(None, tuple(_no_picture_turns(rng, turns)), (), family)
    if family == "scene":
        draws = plain(rng)
        scene = plan_scene(draws)
        image = paint_scene(draws, scene)
        asked = scene_turns(draws, scene.marks, scene.width, scene.height, turns)
        return Sample(image, tuple(_with_outside(rng, asked, turns)), scene.marks, family)
    if family == "text":
        image, marks, text = printed(rng)
        asked = questions.text_turns(rng, text, min(2, turns))
        limit = min(turns, 3)
        return Sample(image, tuple(_with_outside(rng, asked, limit)), tuple(marks), family)
    image, marks, names = chart(rng)
    values = [mark.value for mark in marks if mark.kind == "bar"]
    asked = questions.chart_turns(rng, names, values, turns)
    return Sample(image, tuple(_with_outside(rng, asked, turns)), tuple(marks), family)


def _made_up_marks(rng: np.random.Generator, width: int, height: int) -> tuple[Mark, ...]:
    """Objects of a scene that is never drawn, each in a cell of its own."""
    n = int(rng.integers(1, 9))
    marks: list[Mark] = []
    for cell in rng.permutation(16)[:n]:
        row, column = divmod(int(cell), 4)
        x = (column + float(rng.uniform(0.3, 0.7))) * width / 4
        y = (row + float(rng.uniform(0.3, 0.7))) * height / 4
        shape, color, size = (int(rng.integers(len(names))) for names in (SHAPES, COLORS, SIZES))
        marks.append(Mark("object", x, y, shape=shape, color=color, size=size))
    return tuple(marks)


def corpus(n: int, seed: int) -> Iterator[str]:
    """Questions and answers of `n` samples, as the splits have them, without drawing any picture."""
    rng = np.random.default_rng([_CORPUS_SPLIT, seed])
    for _ in range(n):
        family = _pick_family(rng)
        if family == "none":
            turns = _no_picture_turns(rng, 8)
        elif family == "scene":
            turns = scene_turns(plain(rng), _made_up_marks(rng, 400, 400), 400, 400, 8)
        elif family == "text":
            turns = questions.text_turns(rng, random_text(rng))
        else:
            values, names, _ = chart_data(rng)
            turns = questions.chart_turns(rng, names, values, 8)
        for turn in _with_outside(rng, turns, 8) if family != "none" else turns:
            yield turn.question
            yield turn.answer
