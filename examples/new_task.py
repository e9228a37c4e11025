"""Renders a task for the embedded model, which knows neither hearts nor pink: 400 questions to learn, 200 held out.

    python examples/new_task.py
    llama-mm train recipes/tiny-lora.yaml

Needs the optional extra: pip install -e ".[train]"
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from llama_multimodal.zoo.world import COLORS, SHAPES
from llama_multimodal.zoo.world.palette import RGB, contrast, from_hsv
from llama_multimodal.zoo.world.scenes import Scene, paint_scene, plan_scene
from llama_multimodal.zoo.world.shapes import draw_shape

FOLDER = Path("runs/new-task")
FINE = 4  # a heart is drawn this many times larger, then scaled down, for smooth edges
PLAIN = COLORS.index("black")  # drawn without shading, whatever the tone
COLOR_QUESTIONS = ("What color is the heart?", "Which color does the heart have?", "Tell me the color of the heart.")
SHAPE_QUESTIONS = (
    "What shape is the pink object?",
    "Which shape is the pink thing?",
    "Name the shape of the pink object.",
)


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


def example(seed: int) -> tuple[Image.Image, str, str]:
    """A picture in which one thing is a heart or pink, a question about it, and the answer."""
    rng = random.Random(seed)
    scene = plan_scene(rng, small=1.0)
    chosen = max(range(len(scene.marks)), key=lambda i: scene.diameters[i])
    mark, diameter, tone = scene.marks[chosen], scene.diameters[chosen], scene.tones[chosen]
    both = rng.random() < 0.3  # a pink heart
    about_color = rng.random() < 0.5
    if both or not about_color:
        tone = pink(rng)
        if any(contrast(tone, other) < 35 for other in scene.behind.colors):
            return example(seed + 1_000_003)
    image = paint_scene(rng, without(scene, chosen))
    if both or about_color:
        draw_heart(rng, image, mark.x, mark.y, diameter, tone)
    else:
        draw_shape(rng, image, mark.x, mark.y, diameter, mark.shape, PLAIN, tone, flat=True)
    if about_color:
        return image, rng.choice(COLOR_QUESTIONS), "pink" if both else COLORS[mark.color]
    return image, rng.choice(SHAPE_QUESTIONS), "heart" if both else SHAPES[mark.shape]


def without(scene: Scene, index: int) -> Scene:
    kept = [i for i in range(len(scene.marks)) if i != index]
    parts = ("marks", "diameters", "tones")
    return dataclasses.replace(scene, **{part: tuple(getattr(scene, part)[i] for i in kept) for part in parts})


def main(folder: Path) -> None:
    for name, first, count in (("train", 0, 400), ("heldout", 500_000, 200)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as rows:
            for number in range(count):
                image, question, answer = example(first + number)
                file = Path(name) / f"{number:03d}.png"
                image.save(folder / file)
                row = {"image": str(file), "question": question, "answer": answer}
                rows.write(json.dumps(row) + "\n")
    print(f"{folder}: train.jsonl and heldout.jsonl")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
