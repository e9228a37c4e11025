"""Renders a task for the embedded model, which knows neither hearts nor pink: 400 pictures of them with up to twelve
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
FINE = 4  # a heart is drawn this many times larger, then scaled down, for smooth edges
KINDS = ("color", "shape", "count")


def pink(rng: random.Random) -> RGB:
    return from_hsv(rng.uniform(318, 342), rng.uniform(0.35, 0.62), rng.uniform(0.92, 1.0))


def draw_heart(rng: random.Random, image: Image.Image, x: float, y: float, diameter: float, tone: RGB) -> None:
    """A heart within the circle of that diameter around (x, y), leaning a little."""
    side = math.ceil(diameter) + 4
    left, top = math.floor(x - side / 2), math.floor(y - side / 2)
    lean, scale = rng.uniform(-0.35, 0.35), diameter * FINE / 36
    points = []
    for k in range(96):
        t = 2 * math.pi * k / 96
        u = 16 * math.sin(t) ** 3
        v = -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) - 2.5
        u, v = u * math.cos(lean) - v * math.sin(lean), u * math.sin(lean) + v * math.cos(lean)
        points.append(((x - left) * FINE + u * scale, (y - top) * FINE + v * scale))
    mask = Image.new("L", (side * FINE, side * FINE), 0)
    ImageDraw.Draw(mask).polygon(points, fill=255)
    image.paste(tone, (left, top, left + side, top + side), mask.reduce(FINE))


def example(seed: int) -> tuple[Image.Image, list[Turn]]:
    """A small picture in which one shape gave way to hearts, or one colour to pink, or both; and questions about it,
    in the world's own words, first those that name a heart or pink or have one for an answer."""
    rng = random.Random(seed)
    scene = plan_scene(rng, small=1.0)
    hearts, rosy = rng.choice(((True, False), (False, True), (True, True)))
    tone, like = pink(rng), rng.choice(scene.marks)
    if rosy and any(contrast(tone, other) < 35 for other in scene.behind.colors):
        return example(seed + 1_000_003)
    words = [(SHAPES[like.shape], "heart")] * hearts + [(COLORS[like.color], "pink")] * rosy
    turns = []
    for turn in scene_turns(rng, scene, 60):
        if not turn.kind.startswith(KINDS):
            continue
        asked, answer = turn.question, turn.answer
        for old, new in words:
            asked, answer = renamed(asked, old, new), renamed(answer, old, new)
        turns.append(dataclasses.replace(turn, question=asked, answer=answer))
    other = [
        i for i, m in enumerate(scene.marks) if (hearts and m.shape == like.shape) or (rosy and m.color == like.color)
    ]
    image = paint_scene(rng, without(scene, other))
    for i in other:
        mark, diameter = scene.marks[i], scene.diameters[i]
        fill = tone if rosy and mark.color == like.color else scene.tones[i]
        if hearts and mark.shape == like.shape:
            draw_heart(rng, image, mark.x, mark.y, diameter, fill)
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
    return any(word in f"{turn.question} {turn.answer}".lower() for word in ("heart", "pink"))


def without(scene: Scene, indices: list[int]) -> Scene:
    kept = [i for i in range(len(scene.marks)) if i not in indices]
    parts = ("marks", "diameters", "tones")
    return dataclasses.replace(scene, **{part: tuple(getattr(scene, part)[i] for i in kept) for part in parts})


def conversation(turns: list[Turn]) -> list[dict[str, str]]:
    pairs = ((("user", turn.question), ("assistant", turn.answer)) for turn in turns)
    return [{"role": role, "content": content} for pair in pairs for role, content in pair]


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
    write(folder, "train", ((image, turns[:12]) for image, turns in map(example, range(400))))
    write(folder, "heldout", heldout(500_000_000, 240))
    write(folder, "known", map(known, range(900_000_000, 900_000_800)))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
