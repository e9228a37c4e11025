"""Questions about a scene and their answers, drawn so that no answer of a kind is much more common than the others."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .outside import outside_question
from .phrases import SIDES, article, phrase, thing_words
from .scenes import Scene
from .types import COLORS, OUTSIDE_ANSWER, SHAPES, SIZES, Mark, Mention, Turn

_ROWS, _COLUMNS = ("top", "", "bottom"), ("left", "", "right")
_WHERE = ("left", "right", "above", "below")
_PLURALS = {name: name + ("es" if name == "cross" else "s") for name in SHAPES}
_OUTSIDE_SHARE = 0.05


@dataclass(frozen=True)
class _Asked:
    """A turn, and what it asks whatever its words: no conversation asks the same thing twice."""

    turn: Turn
    topic: tuple[object, ...]


def scene_turns(rng: random.Random, scene: Scene, count: int) -> tuple[Turn, ...]:
    """At most `count` different questions about the scene."""
    turns: list[Turn] = []
    topics = set()
    for _ in range(count):
        if rng.random() < _OUTSIDE_SHARE:
            turns.append(Turn(outside_question(rng, "scene"), OUTSIDE_ANSWER, "outside"))
            continue
        for _ in range(10):  # a kind may not fit the scene, or have been asked
            (maker,) = rng.choices(_MAKERS, _WEIGHTS)
            asked = maker(rng, scene)
            if asked is not None and asked.topic not in topics:
                topics.add(asked.topic)
                turns.append(asked.turn)
                break
    return tuple(turns)


def count_matching(marks: Sequence[Mark], shape: int = -1, color: int = -1, size: int = -1) -> int:
    """How many marks of a scene have the given shape, colour and size; -1 stands for any."""
    total = 0
    for m in marks:
        if shape in (-1, m.shape) and color in (-1, m.color) and size in (-1, m.size):
            total += 1
    return total


def names(rng: random.Random, shape: int = -1, color: int = -1, size: int = -1) -> tuple[str, str]:
    """What such a thing is called, and its plural: "small red circle", "blue objects"."""
    words = [SIZES[size]] if size >= 0 else []
    if words and rng.random() < 0.3:
        words = ["large" if size else "little"]
    words += [COLORS[color]] if color >= 0 else []
    one, many = (SHAPES[shape], _PLURALS[SHAPES[shape]]) if shape >= 0 else thing_words(rng)
    return " ".join([*words, one]), " ".join([*words, many])


def _even_pick(rng: random.Random, options: list[tuple[int, int]], marks: tuple[Mark, ...]) -> tuple[int, int]:
    """One (shape, colour) such that every count that occurs above zero is about equally likely; zero 1 in 7."""
    by_count: dict[int, list[tuple[int, int]]] = {}
    for option in options:
        by_count.setdefault(count_matching(marks, *option), []).append(option)
    absent = by_count.pop(0, [])
    if not by_count or (absent and rng.random() < 1 / 7):
        return rng.choice(absent)
    weights = [min(count, 4) for count in by_count]  # large counts are rarer in the scenes: evened out here
    (found,) = rng.choices(list(by_count.values()), weights)
    return rng.choice(found)


def _counting(kind: str) -> Callable[[random.Random, Scene], _Asked | None]:
    def make(rng: random.Random, scene: Scene) -> _Asked | None:
        marks = scene.marks
        shapes = range(len(SHAPES)) if kind in ("count_shape", "count_both") else (-1,)
        colors = range(len(COLORS)) if kind in ("count_color", "count_both") else (-1,)
        options = [(s, c) for s in shapes for c in colors]
        if kind == "count_both":  # a pair that is absent is asked only where both halves are there
            options = [(s, c) for s, c in options if count_matching(marks, shape=s) and count_matching(marks, color=c)]
        shape, color = _even_pick(rng, options, marks)
        answer = str(count_matching(marks, shape, color))
        if kind == "count_all":
            question = phrase(rng, "count_all", "number")
        elif kind == "count_color" and rng.random() < 0.25:
            question = phrase(rng, "count_color_only", "number", color=COLORS[color])
        else:
            question = phrase(rng, "count", "number", nouns=names(rng, shape, color)[1])
        return _Asked(Turn(question, answer, kind), ("count", shape, color))

    return make


def _attribute(kind: str) -> Callable[[random.Random, Scene], _Asked | None]:
    """kind "color": a shape is named and its colour asked; kind "shape": the reverse."""
    words = COLORS if kind == "color" else SHAPES

    def value(mark: Mark) -> int:
        return mark.color if kind == "color" else mark.shape

    def make(rng: random.Random, scene: Scene) -> _Asked | None:
        marks = scene.marks
        # What a referent fixes: (shape, colour, size), one of shape and colour and perhaps the size.
        keys = [(m.shape, -1, -1) if kind == "color" else (-1, m.color, -1) for m in marks]
        sized = [(s, c, m.size) for (s, c, _), m in zip(keys, marks, strict=True) if _sizes_clear(scene)]
        if rng.random() < 0.1:
            present = {k[0] if kind == "color" else k[1] for k in keys}
            absent = [i for i in range(len(SHAPES if kind == "color" else COLORS)) if i not in present]
            if absent:
                missing = rng.choice(absent)
                noun, _ = names(rng, *((missing, -1) if kind == "color" else (-1, missing)))
                return _Asked(Turn(phrase(rng, kind, "none", noun=noun), f"There is no {noun}.", kind), (kind, missing))
        # Values in turn first, so that rare ones among the unique referents are asked as often as common ones.
        single = [key for key in keys if count_matching(marks, *key) == 1]
        single += [key for key in sized if count_matching(marks, *key) == 1 and (*key[:2], -1) not in single]
        several = []
        for key in set(keys):
            values = {value(m) for m in marks if key[:2] in ((m.shape, -1), (-1, m.color))}
            if count_matching(marks, *key) > 1 and len(values) == 1:
                several.append(key)
        mentions: tuple[Mention, ...] = ()
        if several and (not single or rng.random() < 0.25):
            key = rng.choice(sorted(several))
            question = phrase(rng, f"{kind}_plural", "word", nouns=names(rng, *key)[1])
        elif single:
            key = rng.choice(single)
            noun, _ = names(rng, *key)
            question = phrase(rng, kind, "word", noun=noun)
            mentions = tuple(Mention(noun, m) for m in marks if count_matching((m,), *key))
        else:
            return None
        answer = next(words[value(m)] for m in marks if count_matching((m,), *key))
        return _Asked(Turn(question, answer, kind, mentions), (kind, *key))

    return make


def _existence(rng: random.Random, scene: Scene) -> _Asked | None:
    marks, wanted = scene.marks, rng.random() < 0.5
    draw = rng.random()
    if draw < 0.25:
        options = [(s, -1) for s in range(len(SHAPES))]
    elif draw < 0.5:
        options = [(-1, c) for c in range(len(COLORS))]
    else:
        options = [(s, c) for s in range(len(SHAPES)) for c in range(len(COLORS))]
    options = [o for o in options if bool(count_matching(marks, *o)) == wanted]
    if draw >= 0.5 and not wanted:  # mostly pairs of which one half or both halves are there
        hard = [o for o in options if count_matching(marks, shape=o[0]) and count_matching(marks, color=o[1])]
        half = [o for o in options if count_matching(marks, shape=o[0]) or count_matching(marks, color=o[1])]
        options = hard if hard and rng.random() < 0.6 else half if half and rng.random() < 0.7 else options
    if not options:
        return None
    shape, color = rng.choice(options)
    noun, nouns = names(rng, shape, color)
    question = phrase(rng, "existence", "yes", noun=noun, nouns=nouns, a_noun=article(noun))
    return _Asked(Turn(question, "yes" if wanted else "no", "existence"), ("existence", shape, color))


def _referent(rng: random.Random, scene: Scene, mark: Mark) -> str | None:
    """A name that fits this thing only: shape and colour, or one of them, or with the size; None if there is none."""
    full = (mark.shape, mark.color, -1)
    brief = [k for k in ((mark.shape, -1, -1), (-1, mark.color, -1)) if count_matching(scene.marks, *k) == 1]
    if brief and rng.random() < 0.35:
        return names(rng, *rng.choice(brief))[0]
    if count_matching(scene.marks, *full) == 1:
        return names(rng, *full)[0]
    full = (mark.shape, mark.color, mark.size)
    return names(rng, *full)[0] if _sizes_clear(scene) and count_matching(scene.marks, *full) == 1 else None


def _sizes_clear(scene: Scene) -> bool:
    return all(mark.size >= 0 for mark in scene.marks)


def place_name(x: float, y: float) -> str | None:
    """Which of nine parts of a picture a point lies in, "top left" or "center"; None near a border between parts.

    x, y: 0 to 1 from the left and the top.
    """
    row, column = (_third(share) for share in (y, x))
    if row is None or column is None:
        return None
    return " ".join(word for word in (_ROWS[row], _COLUMNS[column]) if word) or "center"


def _third(share: float) -> int | None:
    """0, 1 or 2 for a share of a side; None within 0.06 of where one third meets the next."""
    if min(abs(share - 1 / 3), abs(share - 2 / 3)) < 0.06:
        return None
    return min(int(3 * share), 2)


def _place(rng: random.Random, scene: Scene) -> _Asked | None:
    by_place: dict[str, list[Mark]] = {}
    for mark in scene.marks:
        name = place_name(mark.x / scene.width, mark.y / scene.height)
        if name is not None:
            by_place.setdefault(name, []).append(mark)
    if not by_place:
        return None
    answer = rng.choice(list(by_place))
    mark = rng.choice(by_place[answer])
    noun = _referent(rng, scene, mark)
    if noun is None:
        return None
    return _Asked(
        Turn(phrase(rng, "place", noun=noun), answer, "place", (Mention(noun, mark),)), ("place", mark.x, mark.y)
    )


def _relation(rng: random.Random, scene: Scene) -> _Asked | None:
    marks = scene.marks
    if len(marks) < 2:
        return None
    where = rng.random() < 0.4
    for _ in range(12):
        i, j = rng.sample(range(len(marks)), 2)
        dx, dy = marks[i].x - marks[j].x, marks[i].y - marks[j].y
        axis = rng.randrange(2)
        if where:
            axis = int(abs(dy) > abs(dx))
        along, across = (dy, dx) if axis else (dx, dy)
        if abs(along) < 0.1 * math.sqrt(scene.width * scene.height):
            continue
        if where and abs(along) < 1.7 * abs(across):
            continue
        one, other = _referent(rng, scene, marks[i]), _referent(rng, scene, marks[j])
        if one is None or other is None:
            continue
        truth = 2 * axis + int(along > 0)  # index into SIDES and _WHERE
        if where:
            question, answer = phrase(rng, "relation_where", "word", one=one, other=other), _WHERE[truth]
        else:
            said = rng.choice((truth, truth ^ 1))
            question = phrase(rng, "relation_yes_no", "yes", one=one, other=other, side=rng.choice(SIDES[said]))
            answer = "yes" if said == truth else "no"
        mentions = (Mention(one, marks[i]), Mention(other, marks[j]))
        return _Asked(Turn(question, answer, "relation", mentions), ("relation", axis, min(i, j), max(i, j)))
    return None


def describe(scene: Scene) -> str | None:
    """The canonical description: up to six things from left to right, more by the number of each shape.

    None where a person could not tell: a size that is neither small nor big, or two things at about the same x.
    """
    marks = sorted(scene.marks, key=lambda mark: mark.x)
    if len(marks) > 6:
        counts = [(count_matching(scene.marks, shape=s), name) for s, name in enumerate(SHAPES)]
        parts = [f"{n} {name if n == 1 else _PLURALS[name]}" for n, name in counts if n]
        return f"{len(marks)} objects: {', '.join(parts)}"
    least = 0.03 * math.sqrt(scene.width * scene.height)
    if not _sizes_clear(scene) or any(b.x - a.x < least for a, b in itertools.pairwise(marks)):
        return None
    return ", ".join(f"a {SIZES[m.size]} {COLORS[m.color]} {SHAPES[m.shape]}" for m in marks)


def _description(rng: random.Random, scene: Scene) -> _Asked | None:
    answer = describe(scene)
    if answer is None:
        return None
    return _Asked(Turn(phrase(rng, "description"), answer, "description"), ("description",))


_Maker = Callable[[random.Random, Scene], _Asked | None]
_MAKERS: tuple[_Maker, ...] = (
    _counting("count_all"), _counting("count_color"), _counting("count_shape"), _counting("count_both"),
    _attribute("color"), _attribute("shape"), _existence, _place, _relation, _description,
)  # fmt: skip
_WEIGHTS = (1.2, 1.2, 1.2, 1.6, 1.0, 1.0, 1.2, 1.5, 4.0, 0.5)
