"""Recipes: the one that is shipped, and every way to get one wrong."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from llama_multimodal.config import ModelConfig
from llama_multimodal.errors import ConfigError
from llama_multimodal.models import VisionLanguageModel
from llama_multimodal.train.config import read_recipe, recipe_from_dict

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.optim.warmup_steps + recipe.optim.decay_steps < recipe.steps


def test_the_embedded_model_is_at_most_12_million_parameters() -> None:
    recipe = read_recipe(RECIPES[0].parent / "tiny.yaml")
    model = VisionLanguageModel(ModelConfig(recipe.vision, recipe.text))
    vocabulary = recipe.text.vocab_size * 2 * recipe.text.hidden_size  # the tokenizer sets its own size: at most 1024
    assert sum(p.numel() for p in model.parameters()) - vocabulary + 1032 * 2 * recipe.text.hidden_size <= 12_000_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 5}, 'unknown key "stepz"; did you mean "steps"?'),
        ({"optim": {"learning_rat": 1}}, 'unknown key "learning_rat"; did you mean "learning_rate"?'),
        ({"steps": "many"}, "steps must be a number"),
        ({"vision": 3}, "vision must be a table"),
        ({"vision": {"image_size": 100, "patch_size": 16}}, "image_size must be a multiple of patch_size"),
        ({"text": {"hidden_size": "wide"}}, "hidden_size must be a number"),
        ({"processes": 2, "data": {"samples_per_step": 1}}, "data.samples_per_step: a step has 1 and processes is 2;"),
        (
            {"processes": 3, "sheet_steps": 1, "data": {"sheets_per_step": 2}},
            "data.sheets_per_step: a step has 2 and processes is 3;",
        ),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    raw = yaml.safe_load((RECIPES[0].parent / "tiny.yaml").read_text())
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        recipe_from_dict({**copy.deepcopy(raw), **change}, "recipe")


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="must be a table"):
        read_recipe(tmp_path / "list.yaml")
    (tmp_path / "short.yaml").write_text("output: x\nsteps: 3\nvision: {}")
    with pytest.raises(ConfigError, match='"text" is missing'):
        read_recipe(tmp_path / "short.yaml")
