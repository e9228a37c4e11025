"""Conversations of the embedded model's world as files, and recipes over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llama_multimodal.train.chat.recipe import ChatRecipe
from llama_multimodal.train.recipes import recipe_from_dict
from llama_multimodal.zoo.world import sample


def write_rows(folder: Path, count: int) -> Path:
    """`count` pictures with a question each, of different lengths, and the answer to the question before it: something
    is left to learn. Returns the list of them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for seed in range(5_000_000, 5_000_000 + 4 * count):
        made = sample(seed, family="scene", small=1.0)
        if made.image is None or not made.turns or len(rows) == count:
            continue
        name = f"{len(rows)}.png"
        made.image.save(folder / name)
        turn = made.turns[len(rows) % len(made.turns)]
        rows.append({"image": name, "question": turn.question, "answer": turn.answer})
    answers = [row["answer"] for row in rows]
    for row, answer in zip(rows, answers[-1:] + answers[:-1], strict=True):
        row["answer"] = answer
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def finetune(rows: Path, output: Path, **changes: Any) -> ChatRecipe:
    """A recipe of three steps of six rows; a change that is a table adds to that table."""
    raw: dict[str, Any] = {
        "model": "tiny", "output": str(output), "steps": 3, "method": "full", "save_every": 2, "threads": 1,
        "data": {"sources": [str(rows)], "workers": 0}, "batch": {"rows": 6},
        "optim": {"learning_rate": 1e-4, "schedule": "constant"},
    }  # fmt: skip
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    recipe = recipe_from_dict(raw, "recipe")
    assert isinstance(recipe, ChatRecipe)
    return recipe
