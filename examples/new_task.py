"""Renders a task for the embedded model, which knows neither bottles nor white: 400 pictures of them with up to twelve
questions each to learn from, 240 held-out pictures with a question each, and 800 pictures of what it knows already, so
that it keeps that.

    python examples/new_task.py
    llama-mm train recipes/tiny-lora.yaml

Needs the optional extra: pip install -e ".[train]"
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

from llama_multimodal.zoo.world import COLORS, SHAPES, Turn, sample
from llama_multimodal.zoo.world.palette import RGB, contrast, from_hsv
from llama_multimodal.zoo.world.questions import scene_turns
from llama_multimodal.zoo.world.scenes import Scene, paint_scene, plan_scene
from llama_multimodal.zoo.world.shapes import draw_shape

FOLDER = Path("runs/new-task")
PLAIN = COLORS.index("black")  # drawn without shading, whatever the tone
FINE = 4  # a bottle is drawn this many times larger, then scaled down, for smooth edges
KINDS = ("color", "shape", "count")
MOST = 5  # things in a picture
HALF = ((0.13, -0.97), (0.13, -0.5), (0.2, -0.38), (0.38, -0.2), (0.42, -0.1), (0.42, 0.88), (0.38, 0.92))
BOTTLE = (*HALF, *((-x, y) for x, y in reversed(HALF)))  # its outline, within a circle of radius 1


def white(rng: random.Random) -> RGB:
    return from_hsv(rng.uniform(0, 360), rng.uniform(0.0, 0.05), rng.uniform(0.93, 1.0))


def draw_bottle(rng: random.Random, image: Image.Image, x: float, y: float, diameter: float, tone: RGB) -> None:
    """A bottle within the circle of that diameter around (x, y), leaning a little."""
    side = math.ceil(diameter) + 4
    left, top = math.floor(x - side / 2), math.floor(y - side / 2)
    lean, scale = rng.uniform(-0.35, 0.35), diameter * FINE / 2
    points = []
    for u, v in BOTTLE:
        u, v = u * math.cos(lean) - v * math.sin(lean), u * math.sin(lean) + v * math.cos(lean)
        points.append(((x - left) * FINE + u * scale, (y - top) * FINE + v * scale))
    mask = Image.new("L", (side * FINE, side * FINE), 0)
    ImageDraw.Draw(mask).polygon(points, fill=255)
    image.paste(tone, (left, top, left + side, top + side), mask.reduce(FINE))


def example(seed: int) -> tuple[Image.Image, list[Turn]]:
    """A small picture in which one shape gave way to bottles, or one colour to white, or both; and questions about it,
    in the world's own words, first those that name a bottle or white or have one for an answer. Numbers, which are the
    hardest, are asked for twice, in other words."""
    rng = random.Random(seed)
    scene = plan_scene(rng, small=1.0)
    while len(scene.marks) > MOST:
        scene = plan_scene(rng, small=1.0)
    bottles, pale = rng.choice(((True, False), (False, True), (True, True)))
    tone, like = white(rng), rng.choice(scene.marks)
    if pale and any(contrast(tone, other) < 35 for other in scene.behind.colors):
        return example(seed + 1_000_003)
    words = [(SHAPES[like.shape], "bottle")] * bottles + [(COLORS[like.color], "white")] * pale
    once, again = scene_turns(rng, scene, 60), scene_turns(rng, scene, 60)
    asked = {turn.question: turn for turn in once if turn.kind.startswith(KINDS)}
    asked |= {turn.question: turn for turn in again if turn.kind.startswith("count")}
    turns = []
    for turn in asked.values():
        question, answer = turn.question, turn.answer
        for old, new in words:
            question, answer = renamed(question, old, new), renamed(answer, old, new)
        turns.append(dataclasses.replace(turn, question=question, answer=answer))
    rng.shuffle(turns)
    other = [
        i for i, m in enumerate(scene.marks) if (bottles and m.shape == like.shape) or (pale and m.color == like.color)
    ]
    image = paint_scene(rng, without(scene, other))
    for i in other:
        mark, diameter = scene.marks[i], scene.diameters[i]
        fill = tone if pale and mark.color == like.color else scene.tones[i]
        if bottles and mark.shape == like.shape:
            draw_bottle(rng, image, mark.x, mark.y, diameter, fill)
        else:
            draw_shape(rng, image, mark.x, mark.y, diameter, mark.shape, PLAIN, fill, flat=True)
    return image, sorted(turns, key=lambda turn: not is_new(turn))


def renamed(text: str, old: str, new: str) -> str:
    """The text with one word for another, in the plural and with its article too."""

    def put(found: re.Match[str]) -> str:
        word = ("a " if found[1] else "") + new + ("s" if found[3] else "")
        return word[0].upper() + word[1:] if found[0][0].isupper() else word

    return re.sub(rf"\b(an? )?({old})(e?s)?\b", put, text, flags=re.IGNORECASE)


def is_new(turn: Turn) -> bool:
    return any(word in f"{turn.question} {turn.answer}".lower() for word in ("bottle", "white"))


def without(scene: Scene, indices: list[int]) -> Scene:
    kept = [i for i in range(len(scene.marks)) if i not in indices]
    parts = ("marks", "diameters", "tones")
    return dataclasses.replace(scene, **{part: tuple(getattr(scene, part)[i] for i in kept) for part in parts})


def conversation(turns: list[Turn]) -> list[dict[str, str]]:
    pairs = ((("user", turn.question), ("assistant", turn.answer)) for turn in turns)
    return [{"role": role, "content": content} for pair in pairs for role, content in pair]


def lesson(seed: int) -> tuple[Image.Image, list[Turn]]:
    """What is new in a picture, and one question about what is not."""
    image, turns = example(seed)
    new = [turn for turn in turns if is_new(turn)]
    return image, new[:11] + turns[len(new) :][:1]


def heldout(first: int, count: int) -> Iterator[tuple[Image.Image, list[Turn]]]:
    """One question a picture, the kinds in turn."""
    made = 0
    for seed in range(first, first + 20 * count):
        image, turns = example(seed)
        asked = [turn for turn in turns if is_new(turn) and turn.kind.startswith(KINDS[made % len(KINDS)])]
        if asked and made < count:
            made += 1
            yield image, asked[:1]


def known(seed: int) -> tuple[Image.Image | None, list[Turn]]:
    """A picture of the world that the model was trained on, and questions about it."""
    item = sample(seed, small=0.7)
    return item.image, list(item.turns)


def write(folder: Path, name: str, pictures: Iterator[tuple[Image.Image | None, list[Turn]]]) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as rows:
        for number, (image, turns) in enumerate(pictures):
            row: dict[str, object] = {"messages": conversation(turns), "kinds": [turn.kind for turn in turns]}
            if image is not None:
                file = Path(name) / f"{number:03d}.png"
                image.save(folder / file)
                row["images"] = [str(file)]
            rows.write(json.dumps(row) + "\n")
    print(folder / f"{name}.jsonl")


def main(folder: Path) -> None:
    write(folder, "train", map(lesson, range(400)))
    write(folder, "heldout", heldout(500_000_000, 240))
    write(folder, "known", map(known, range(900_000_000, 900_000_800)))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
