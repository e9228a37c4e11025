"""Questions about a scene and their answers, computed from its marks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from llama_multimodal.zoo.world.types import COLORS, SHAPES, SIZES, Mark, Turn

# {thing} is a full name with its colour ("red circle"), {things} its plural; {one} and {other} start with "the".
SCENE_TEMPLATES: dict[str, tuple[str, ...]] = {
    "count_all": (
        "How many objects are there?",
        "How many shapes are there?",
        "How many things are in the picture?",
        "How many objects are in the image?",
        "How many shapes can you see?",
        "How many objects do you see in this picture?",
        "Count the objects.",
        "Count all the shapes in the picture.",
        "What is the total number of objects?",
        "What is the number of shapes in this image?",
    ),
    "count_color": (
        "How many {color} objects are there?",
        "How many {color} shapes are there?",
        "How many {color} things are in the picture?",
        "How many objects are {color}?",
        "How many of the shapes are {color}?",
        "How many {color} objects can you see?",
        "Count the {color} objects.",
        "Count the {color} shapes in the image.",
        "What is the number of {color} objects?",
        "How many {color} shapes do you see?",
    ),
    "count_shape": (
        "How many {shapes} are there?",
        "How many {shapes} are in the picture?",
        "How many {shapes} are there in the image?",
        "How many {shapes} can you see?",
        "How many {shapes} do you see?",
        "How many of the objects are {shapes}?",
        "Count the {shapes}.",
        "Count all the {shapes} in this picture.",
        "What is the number of {shapes}?",
    ),
    "count_both": (
        "How many {color} {shapes} are there?",
        "How many {color} {shapes} are in the picture?",
        "How many {color} {shapes} are there in the image?",
        "How many {color} {shapes} can you see?",
        "How many {color} {shapes} do you see?",
        "How many of the {shapes} are {color}?",
        "How many {shapes} are {color}?",
        "Count the {color} {shapes}.",
        "Count all the {color} {shapes} in this picture.",
        "What is the number of {color} {shapes}?",
    ),
    "color": (
        "What color is the {one}?",
        "What colour is the {one}?",
        "Which color is the {one}?",
        "Which colour is the {one}?",
        "What is the color of the {one}?",
        "What is the colour of the {one}?",
        "What color does the {one} have?",
        "Tell me the color of the {one}.",
        "Name the colour of the {one}.",
    ),
    "shape": (
        "What shape is the {one}?",
        "Which shape is the {one}?",
        "What is the shape of the {one}?",
        "What shape does the {one} have?",
        "Which shape does the {one} have?",
        "Tell me the shape of the {one}.",
        "Name the shape of the {one}.",
        "What kind of shape is the {one}?",
    ),
    "existence": (
        "Is there a {thing}?",
        "Is there a {thing} in the picture?",
        "Is there a {thing} in the image?",
        "Can you see a {thing}?",
        "Do you see a {thing}?",
        "Are there any {things}?",
        "Are there any {things} in this picture?",
        "Does the picture have a {thing}?",
        "Does the image show a {thing}?",
    ),
    "relation": (
        "Is the {one} {place} the {other}?",
        "Is the {one} {place} the {other} in the picture?",
        "In the image, is the {one} {place} the {other}?",
        "Do you see the {one} {place} the {other}?",
        "Where is the {one} compared with the {other}?",
        "Where is the {one} compared to the {other}?",
        "Where is the {one} relative to the {other}?",
        "Where is the {one}, seen from the {other}?",
        "On which side of the {other} is the {one}?",
        "In the picture, where is the {one} compared with the {other}?",
    ),
    "description": (
        "Describe the picture.",
        "Describe the image.",
        "Describe this picture.",
        "What is in the picture?",
        "What is in the image?",
        "What do you see?",
        "What can you see in this picture?",
        "What does the image show?",
        "Which objects are there?",
        "List the objects from left to right.",
    ),
}
_WEIGHTS = {
    "count_all": 7,
    "count_color": 12,
    "count_shape": 12,
    "count_both": 14,
    "color": 8,
    "shape": 8,
    "existence": 14,
    "relation": 20,
    "description": 5,
}
# The way each direction is asked after, and whether it runs along x and towards larger values.
_DIRECTIONS: dict[str, tuple[tuple[str, ...], int, int]] = {
    "left": (("to the left of", "left of"), 0, -1),
    "right": (("to the right of", "right of"), 0, 1),
    "above": (("above", "higher than"), 1, -1),
    "below": (("below", "lower than", "under"), 1, 1),
}
Pair = tuple[str, str]


def scene_turns(rng: random.Random, marks: Sequence[Mark], width: int, height: int, n: int) -> list[Turn]:
    """At most n turns (n whenever the scene has that many different questions) about a scene."""
    makers: dict[str, Callable[[], Pair | None]] = {
        "count_all": lambda: (_form(rng, "count_all"), str(len(marks))),
        "count_color": lambda: _count_color(rng, marks),
        "count_shape": lambda: _count_shape(rng, marks),
        "count_both": lambda: _count_both(rng, marks),
        "color": lambda: _color(rng, marks),
        "shape": lambda: _shape(rng, marks),
        "existence": lambda: _existence(rng, marks),
        "relation": lambda: _relation(rng, marks, width, height),
        "description": lambda: _description(rng, marks),
    }
    kinds, weights = list(_WEIGHTS), list(_WEIGHTS.values())
    turns: list[Turn] = []
    asked: set[str] = set()
    for _ in range(20 * n):
        if len(turns) == n:
            break
        kind = rng.choices(kinds, weights)[0]
        pair = makers[kind]()
        if pair is None or pair[0] in asked:
            continue
        asked.add(pair[0])
        turns.append(Turn(_dress(rng, pair[0], number=kind.startswith("count")), pair[1], kind))
    return turns


def plural(shape: str) -> str:
    """The plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


def _form(rng: random.Random, kind: str, **fields: str) -> str:
    question = rng.choice(SCENE_TEMPLATES[kind]).format(**fields)
    return question.replace(" a orange", " an orange")


def _dress(rng: random.Random, question: str, *, number: bool) -> str:
    """The question as different people type it."""
    draw = rng.random()
    if draw < 0.6:
        return question
    if draw < 0.7:
        return question[0].lower() + question[1:]
    if draw < 0.78:
        return question.rstrip("?.")
    if draw < 0.86:
        return (question[0].lower() + question[1:]).rstrip("?.")
    if number and draw < 0.93:
        return question + rng.choice((" Just the number.", " Answer with a number.", " Only the number, please."))
    if question.endswith("."):
        return "Please " + question[0].lower() + question[1:]
    return rng.choice(("Please tell me: ", "Look at the picture. ")) + question


def _spread(rng: random.Random, counts: dict[int, int]) -> int:
    """One of the present indices; larger counts more often, so that answers are not mostly 1."""
    return rng.choices(list(counts), [c**2 for c in counts.values()])[0]


def _tally(values: Sequence[int]) -> dict[int, int]:
    return {value: values.count(value) for value in values}


def _count_color(rng: random.Random, marks: Sequence[Mark]) -> Pair | None:
    counts = _tally([m.color for m in marks])
    missing = [c for c in range(len(COLORS)) if c not in counts]
    color = rng.choice(missing) if missing and rng.random() < 0.15 else _spread(rng, counts)
    return _form(rng, "count_color", color=COLORS[color]), str(counts.get(color, 0))


def _count_shape(rng: random.Random, marks: Sequence[Mark]) -> Pair | None:
    counts = _tally([m.shape for m in marks])
    missing = [s for s in range(len(SHAPES)) if s not in counts]
    shape = rng.choice(missing) if missing and rng.random() < 0.15 else _spread(rng, counts)
    return _form(rng, "count_shape", shapes=plural(SHAPES[shape])), str(counts.get(shape, 0))


def _count_both(rng: random.Random, marks: Sequence[Mark]) -> Pair | None:
    pairs = [m.color * len(SHAPES) + m.shape for m in marks]
    counts = _tally(pairs)
    color, shape = _absent(rng, marks) if rng.random() < 0.15 else divmod(_spread(rng, counts), len(SHAPES))
    count = counts.get(color * len(SHAPES) + shape, 0)
    return _form(rng, "count_both", color=COLORS[color], shapes=plural(SHAPES[shape])), str(count)


def _absent(rng: random.Random, marks: Sequence[Mark]) -> tuple[int, int]:
    """A colour and a shape that are not together in the scene; mostly each of them is there on its own."""
    present = {(m.color, m.shape) for m in marks}
    draw = rng.random()
    colors = {m.color for m in marks} if draw < 0.85 else set(range(len(COLORS)))
    shapes = {m.shape for m in marks} if draw < 0.7 or draw >= 0.85 else set(range(len(SHAPES)))
    pairs = [(c, s) for c in sorted(colors) for s in sorted(shapes) if (c, s) not in present]
    if not pairs:
        pairs = [(c, s) for c in range(len(COLORS)) for s in range(len(SHAPES)) if (c, s) not in present]
    return rng.choice(pairs)


def _names(mark: Mark) -> tuple[str, str, str]:
    """Colour, shape and size; the size is empty where it is neither clearly small nor clearly big."""
    return COLORS[mark.color], SHAPES[mark.shape], SIZES[mark.size] if mark.size >= 0 else ""


def _color(rng: random.Random, marks: Sequence[Mark]) -> Pair | None:
    if rng.random() < 0.05:
        missing = [s for s in range(len(SHAPES)) if all(m.shape != s for m in marks)]
        if missing:
            shape = SHAPES[rng.choice(missing)]
            return _form(rng, "color", one=shape), f"There is no {shape}."
    found = []
    for mark in marks:
        color, shape, size = _names(mark)
        same = [m for m in marks if m.shape == mark.shape]
        if len(same) == 1:
            found.append((shape, color))
        elif all(m.size >= 0 for m in same) and sum(m.size == mark.size for m in same) == 1:
            found.append((f"{size} {shape}", color))
    if len(marks) == 1:
        found.append((rng.choice(("object", "shape")), COLORS[marks[0].color]))
    if not found:
        return None
    one, answer = rng.choice(found)
    return _form(rng, "color", one=one), answer


def _shape(rng: random.Random, marks: Sequence[Mark]) -> Pair | None:
    noun = rng.choice(("object", "object", "thing"))
    if rng.random() < 0.05:
        missing = [c for c in range(len(COLORS)) if all(m.color != c for m in marks)]
        if missing:
            name = f"{COLORS[rng.choice(missing)]} {noun}"
            return _form(rng, "shape", one=name), f"There is no {name}."
    found = []
    for mark in marks:
        color, shape, size = _names(mark)
        same = [m for m in marks if m.color == mark.color]
        if len(same) == 1:
            found.append((f"{color} {noun}", shape))
        elif all(m.size >= 0 for m in same) and sum(m.size == mark.size for m in same) == 1:
            found.append((f"{size} {color} {noun}", shape))
    if not found:
        return None
    one, answer = rng.choice(found)
    return _form(rng, "shape", one=one), answer


def _existence(rng: random.Random, marks: Sequence[Mark]) -> Pair | None:
    if rng.random() < 0.75:
        yes = rng.random() < 0.5
        mark = rng.choice(marks)
        color, shape = (mark.color, mark.shape) if yes else _absent(rng, marks)
        thing, things = f"{COLORS[color]} {SHAPES[shape]}", f"{COLORS[color]} {plural(SHAPES[shape])}"
    else:
        missing = [s for s in range(len(SHAPES)) if all(m.shape != s for m in marks)]
        yes = rng.random() < 0.5 or not missing
        shape = rng.choice(marks).shape if yes else rng.choice(missing)
        thing, things = SHAPES[shape], plural(SHAPES[shape])
    return _form(rng, "existence", thing=thing, things=things), "yes" if yes else "no"


def _referents(rng: random.Random, marks: Sequence[Mark]) -> list[tuple[Mark, str]]:
    """The things that a short name singles out, each with such a name."""
    found = []
    for mark in marks:
        color, shape, _ = _names(mark)
        names = []
        if sum(m.color == mark.color and m.shape == mark.shape for m in marks) == 1:
            names += [f"{color} {shape}"] * 3
        if sum(m.shape == mark.shape for m in marks) == 1:
            names.append(shape)
        if sum(m.color == mark.color for m in marks) == 1:
            names.append(f"{color} object")
        if names:
            found.append((mark, rng.choice(names)))
    return found


def _relation(rng: random.Random, marks: Sequence[Mark], width: int, height: int) -> Pair | None:
    found = _referents(rng, marks)
    if len(found) < 2:
        return None
    (a, one), (b, other) = rng.sample(found, 2)
    offsets = (a.x - b.x, a.y - b.y)
    least = 0.1 * math.sqrt(width * height)
    if rng.random() < 0.5:
        # "yes" and "no" equally often: the axis first, then which of its two directions is asked after.
        axes = [axis for axis in (0, 1) if abs(offsets[axis]) >= least]
        if not axes:
            return None
        axis, yes = rng.choice(axes), rng.random() < 0.5
        sign = 1 if (offsets[axis] > 0) == yes else -1
        places = next(words for words, along, way in _DIRECTIONS.values() if (along, way) == (axis, sign))
        form = rng.choice([t for t in SCENE_TEMPLATES["relation"] if "{place}" in t])
        return form.format(one=one, other=other, place=rng.choice(places)), "yes" if yes else "no"
    axis = 0 if abs(offsets[0]) > abs(offsets[1]) else 1
    if abs(offsets[axis]) < max(least, 1.7 * abs(offsets[1 - axis])):
        return None
    sign = 1 if offsets[axis] > 0 else -1
    answer = next(name for name, (_, along, way) in _DIRECTIONS.items() if (along, way) == (axis, sign))
    form = rng.choice([t for t in SCENE_TEMPLATES["relation"] if "{place}" not in t])
    return form.format(one=one, other=other), answer


def _description(rng: random.Random, marks: Sequence[Mark]) -> Pair | None:
    if len(marks) > 5:
        return None
    # A size is named only where it is clear.
    parts = [" ".join(f"a {size} {color} {shape}".split()) for color, shape, size in map(_names, sorted(marks, key=lambda m: m.x))]
    return _form(rng, "description"), ", ".join(parts)
