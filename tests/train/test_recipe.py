"""Recipes: those that are shipped, at their models' full size, and every way to get one wrong."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.testing._internal.distributed.fake_pg import FakeStore

from llama_multimodal.adapters.targets import resolve
from llama_multimodal.config import ModelConfig
from llama_multimodal.distributed import local_part, make_mesh, parallelize, shard_model
from llama_multimodal.errors import ConfigError
from llama_multimodal.loading import load
from llama_multimodal.models import LanguageModel, VisionLanguageModel
from llama_multimodal.planning import GPUS, PlanOptions
from llama_multimodal.train import memory
from llama_multimodal.train.chat.memory import config_of, memory_plan
from llama_multimodal.train.chat.model import make_trainable
from llama_multimodal.train.chat.parts import part_of
from llama_multimodal.train.chat.recipe import BatchConfig, ChatRecipe
from llama_multimodal.train.config import ParallelOptions
from llama_multimodal.train.recipes import read_recipe, recipe_from_dict
from llama_multimodal.train.record import write_record
from llama_multimodal.train.world.config import WorldRecipe
from llama_multimodal.weights.checkpoint import build_on_meta
from llama_multimodal.zoo.configs import CONFIGS

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TINY = RECIPES[0].parent / "tiny.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.optim.warmup_steps + recipe.optim.decay_steps < recipe.steps
    assert recipe.output == f"runs/{path.stem}"
    write_record(recipe, tmp_path)
    assert read_recipe(tmp_path / "recipe.yaml") == recipe


def weightless(name: str) -> LanguageModel:
    return load(name, device="meta")[0] if name == "tiny" else build_on_meta(CONFIGS[name])


@pytest.mark.parametrize("path", [p for p in RECIPES if p != TINY], ids=lambda p: p.stem)
def test_what_learns_is_there_at_full_size(path: Path) -> None:
    recipe = read_recipe(path)
    assert isinstance(recipe, ChatRecipe)
    model = weightless(recipe.model)
    everything = {part_of(name, model.config.text) for name, _ in model.named_parameters()}
    adapted = resolve(model, recipe.lora)
    make_trainable(model, recipe, torch.bfloat16)
    learning = {name: value for name, value in model.named_parameters() if value.requires_grad}
    parts = {part_of(name, model.config.text) for name in learning}
    if recipe.method == "full":
        assert parts == everything - set(recipe.freeze) and set(recipe.freeze) <= everything
        assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in model.parameters())
    else:
        assert len(learning) == 2 * len(adapted) > 0
        assert {value.dtype for value in learning.values()} == {torch.float32}
    assert set(recipe.optim.learning_rates) <= parts


@pytest.mark.parametrize("path", [p for p in RECIPES if re.search(r"\dx\d", p.stem)], ids=lambda p: p.stem)
def test_a_recipe_fits_the_card_that_its_name_promises(path: Path) -> None:
    """As planned, at full size, on the smallest card of so many gigabytes."""
    recipe = read_recipe(path)
    assert isinstance(recipe, ChatRecipe)
    count, size = map(int, re.findall(r"(\d)x(\d+)gb", path.stem)[0])
    made = memory_plan(recipe, config_of(recipe), count, "cuda")
    card = min((gpu for gpu in GPUS if gpu.name.endswith(f" {size} GB")), key=lambda gpu: gpu.memory)
    assert card.fits(made.total) == "yes", f"{made.total / 2**30:.1f} GiB"
    adapters = len(resolve(weightless(recipe.model), recipe.lora))
    assert recipe.method == "full" or made.trained_parameters > adapters * recipe.lora.rank
    if count > 1:  # and would not without its section
        alone = dataclasses.replace(recipe, parallel=ParallelOptions())
        assert card.fits(memory_plan(alone, config_of(recipe), count, "cuda").total) == "no"


@pytest.fixture
def eight() -> Iterator[None]:
    """The first of eight processes, of which there are no others."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "options", [ParallelOptions("fsdp"), ParallelOptions(tensor_parallel=8)], ids=["fsdp", "tensor"]
)
@pytest.mark.parametrize("name", ["11b-full-8x80gb", "90b-lora-8x80gb"])
def test_a_process_holds_as_much_as_is_planned(name: str, options: ParallelOptions, eight: None) -> None:
    """The model at its full size, cut among eight processes as a run cuts it, without memory."""
    recipe = read_recipe(TINY.parent / f"{name}.yaml")
    assert isinstance(recipe, ChatRecipe) and recipe.parallel == ParallelOptions("fsdp")
    recipe = dataclasses.replace(recipe, parallel=options)
    model = make_trainable(weightless(recipe.model).to(torch.bfloat16), recipe, torch.bfloat16)
    mesh = make_mesh(options.mesh(8), "cpu")
    parallelize(model, mesh)
    if options.method == "fsdp":
        shard_model(model, mesh, precision=torch.bfloat16 if recipe.method == "full" else None)
    held = sum(local_part(parameter).nbytes for parameter in model.parameters())
    made = memory_plan(recipe, model.config, 8, "cuda")
    assert held == pytest.approx(made.part("weights").bytes + made.part("adapters").bytes, rel=0.01)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_says_what_memory_it_plans(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(memory, "usable", lambda device: 80 * 2**30)
    notes = read_recipe(path).notes()
    assert re.match(r"memory plan, each of 8 processes \((ddp|fsdp)\): \d+\.\d\d GiB at the peak, which is", notes[0])
    assert not any("warning" in note for note in notes)


def test_a_packed_row_is_planned_at_its_full_length() -> None:
    """Its conversations lie within the model's context, and all of them together may not."""
    recipe = read_recipe(TINY.parent / "tiny-lora.yaml")
    assert isinstance(recipe, ChatRecipe)
    config = config_of(recipe)
    context = config.text.max_position_embeddings
    data = dataclasses.replace(recipe.data, max_length=context - 100)

    def load_of(**batch: Any) -> tuple[int, int, int]:
        packed = dataclasses.replace(recipe, data=data, batch=BatchConfig(rows=8, packing=True, **batch))
        load = memory_plan(packed, config, 1, "cpu").load
        return load.rows, load.context, load.images

    assert load_of(tokens=10) == (1, context - 100, 1)  # a row alone may be longer
    assert load_of(tokens=3 * context) == (1, 3 * context, 3)
    assert load_of(tokens=3 * context, rows_at_once=2) == (1, 2 * (context - 100), 2)
    assert load_of(tokens=100 * context) == (1, 8 * (context - 100), 8)  # all of a step
    with pytest.raises(ConfigError, match="packed is for training"):
        PlanOptions(packed=2)


def test_what_does_not_fit_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(read_recipe(TINY.parent / "11b-lora-1x80gb.yaml"), device="cpu")
    monkeypatch.setattr(memory, "usable", lambda device: 24 * 2**30)
    assert "warning: the plan is 28" in recipe.notes()[-1] and "cpu has 24.0 GiB for each process" in recipe.notes()[-1]
    monkeypatch.setattr(memory, "usable", lambda device: 12 * 2**30)
    with pytest.raises(ConfigError, match=r"weights and optimizer alone take 21.1 GiB, and cpu has 12.0 GiB"):
        recipe.notes()


def test_the_embedded_model_is_at_most_12_million_parameters() -> None:
    recipe = read_recipe(TINY)
    assert isinstance(recipe, WorldRecipe)
    model = VisionLanguageModel(ModelConfig(recipe.vision, recipe.text))
    vocabulary = recipe.text.vocab_size * 2 * recipe.text.hidden_size  # the tokenizer sets its own size: at most 1024
    assert sum(p.numel() for p in model.parameters()) - vocabulary + 1032 * 2 * recipe.text.hidden_size <= 12_000_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 5}, 'unknown key "stepz"; did you mean "steps"?'),
        ({"optim": {"learning_rat": 1}}, 'unknown key "learning_rat"; did you mean "learning_rate"?'),
        ({"steps": "many"}, "steps must be a number"),
        ({"output": 5}, "output must be a text, not 5"),
        ({"deterministic": "no"}, "deterministic must be true or false"),
        ({"vision": 3}, "vision must be a table"),
        ({"vision": {"image_size": 100, "patch_size": 16}}, "image_size must be a multiple of patch_size"),
        ({"text": {"hidden_size": "wide"}}, "hidden_size must be a number"),
        ({"text": {"rope_scaling": {"facto": 2.0}}}, 'unknown key "facto"; did you mean "factor"?'),
        ({"processes": 2, "data": {"samples_per_step": 1}}, "data.samples_per_step: a step has 1 and processes is 2;"),
        (
            {"processes": 3, "sheet_steps": 1, "data": {"sheets_per_step": 2}},
            "data.sheets_per_step: a step has 2 and processes is 3;",
        ),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    raw = yaml.safe_load(TINY.read_text())
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
    (tmp_path / "short.yaml").write_text("task: world\noutput: x\nsteps: 3\nvision: {}")
    with pytest.raises(ConfigError, match='"text" is missing'):
        read_recipe(tmp_path / "short.yaml")
    (tmp_path / "chat.yaml").write_text("output: x\nsteps: 3\ndata: {sources: [{file: x.jsonl}]}")
    with pytest.raises(ConfigError, match='"model" is missing'):
        read_recipe(tmp_path / "chat.yaml")
