"""A small base model, conversations with and without pictures, and recipes over them, for runs that share a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from small_model import random_model

from llama_multimodal.config import ModelConfig
from llama_multimodal.distributed import make_mesh
from llama_multimodal.loading import load
from llama_multimodal.train import loop
from llama_multimodal.train.chat.recipe import ChatRecipe
from llama_multimodal.train.parallel import Group
from llama_multimodal.train.recipes import recipe_from_dict
from llama_multimodal.weights.save import save_checkpoint
from llama_multimodal.zoo.registry import EMBEDDED_FOLDER
from llama_multimodal.zoo.world import sample

STEPS = 4


def write_base(folder: Path) -> Path:
    """A model of the embedded one's kind and vocabulary, whose heads two processes can share: that has 3 and 1."""
    tiny, _ = load("tiny", device="meta")
    assert isinstance(tiny.config, ModelConfig)
    vision = replace(
        tiny.config.vision, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=1,
        num_global_layers=1, intermediate_layers_indices=(0,),
    )  # fmt: skip
    text = replace(
        tiny.config.text, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, cross_attention_layers=(1,),
    )  # fmt: skip
    model = random_model(config=ModelConfig(vision, text, tiny.config.image_token_id))
    save_checkpoint(model, folder / "base", tokenizer_from=EMBEDDED_FOLDER)
    return folder / "base"


def write_rows(folder: Path) -> Path:
    """Twelve rows: every third has a picture, of one tile or of several."""
    rows: list[dict[str, Any]] = []
    for i in range(12):
        made = sample(5_000_000 + i, family="scene", small=0.5)
        turn = made.turns[0] if made.turns else None
        row = {"question": f"what is this {'very ' * (i % 5)}?", "answer": "red " * (1 + i % 3)}
        if i % 3 == 0 and made.image is not None and turn is not None:
            made.image.save(folder / f"{i}.png")
            row = {"image": f"{i}.png", "question": turn.question, "answer": turn.answer}
        rows.append(row)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def table(base: Path, rows: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Steps of five rows in micro-batches of two: two readers have other numbers of them. The last step is saved."""
    raw: dict[str, Any] = {
        "model": str(base), "output": str(output), "steps": STEPS, "method": "lora", "save_every": 100, "threads": 1,
        "device": "cpu", "lora": {"rank": 4, "targets": ["self", "cross", "mlp", "projector"]},
        "data": {"sources": [str(rows)], "evaluation": [str(rows)], "workers": 0},
        "batch": {"rows": 5, "rows_at_once": 2},
        "evaluate": {"every": 2, "rows": 5, "answers": 3, "max_new_tokens": 3},
        "optim": {"learning_rate": 1e-2, "schedule": "constant", "weight_decay": 0.1, "ema_decay": 0.5},
    }  # fmt: skip
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    if raw.pop("distill", False):
        raw["data"]["sources"] = [{"file": str(rows), "weight": 1}, {"file": str(rows), "weight": 1, "distill": True}]
    return raw


def recipe(base: Path, rows: Path, output: Path, **changes: Any) -> ChatRecipe:
    made = recipe_from_dict(table(base, rows, output, **changes), "recipe")
    assert isinstance(made, ChatRecipe)
    return made


def run_here(recipe: ChatRecipe) -> None:
    """In one of the processes that the tests share."""
    processes = torch.distributed.get_world_size()
    mesh = make_mesh(recipe.sharing.mesh(processes), recipe.device_type)
    loop._run(recipe, Group.of(mesh), lambda progress: None)


def write_recipe(raw: dict[str, Any], file: Path) -> Path:
    file.write_text(yaml.safe_dump(raw))
    return file
