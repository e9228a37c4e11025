"""Training by a recipe on several processes: whatever way they share the model, they take the steps of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Group, Ranks
from safetensors.torch import load_file
from train_runs import recipe, run_here, write_base, write_rows

from llama_multimodal.train import checkpoint, loop, shards, watch
from llama_multimodal.train.chat.recipe import ChatRecipe
from llama_multimodal.train.parallel import Group as Alone
from llama_multimodal.train.task import trained

WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"method": "ddp"},
    "fsdp": {"method": "fsdp"},
    "tensor": {"tensor_parallel": 2},
}
Make = Callable[..., ChatRecipe]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A recipe by the name of its output's folder."""
    folder = tmp_path_factory.mktemp("runs")
    base, rows = write_base(folder), write_rows(folder)
    return lambda name, **changes: recipe(base, rows, folder / name, **changes)


def metrics(run: ChatRecipe, key: str = "loss") -> list[float]:
    return [progress.values[key] for progress in watch.lines(Path(run.output)) if key in progress.values]


def alone(run: ChatRecipe) -> ChatRecipe:
    if not Path(run.output).exists():
        loop.train(run, lambda progress: None)
        loop.export(run)
    return run


@pytest.fixture(scope="module")
def one(make: Make) -> ChatRecipe:
    return alone(make("one"))


def adapter(run: ChatRecipe) -> dict[str, torch.Tensor]:
    return load_file(Path(run.output) / "adapter" / "adapter_model.safetensors")


def assert_same_run(run: ChatRecipe, wanted: ChatRecipe) -> None:
    for key in ("loss", "gradient_norm", "eval_loss", "eval_exact_match", "eval_anls", "learnt_tokens"):
        assert metrics(run, key) == pytest.approx(metrics(wanted, key), abs=1e-5), key
    assert len(metrics(run)) == wanted.steps
    assert adapter(run).keys() == adapter(wanted).keys()
    for name, value in adapter(wanted).items():
        torch.testing.assert_close(adapter(run)[name], value, rtol=0, atol=1e-5, msg=name)
    ours, theirs = (json.loads((Path(r.output) / "adapter/adapter_config.json").read_text()) for r in (run, wanted))
    assert ours == theirs


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_learn_what_one_learns(way: str, make: Make, one: ChatRecipe, two: Group) -> None:
    run = make(way, parallel=WAYS[way])
    two(run_here, run)
    loop.export(run)
    assert_same_run(run, one)
    assert len(checkpoint.saved_steps(run.checkpoints)) == 2  # keep_last


FULL = {"method": "full", "steps": 3, "evaluate": {"every": 0}, "optim": {"learning_rate": 1e-3, "ema_decay": None}}
FEW = {"steps": 3, "evaluate": {"every": 0}}
OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "all weights, packed": (2, {**FULL, "batch": {"packing": True, "tokens": 60}, "recompute": True}),
    "a frozen encoder, kept gathered": (
        2, {**FULL, "freeze": ["vision"], "parallel": {"reshard_after_forward": False}}
    ),
    "the head alone": (2, {**FULL, "freeze": ["vision", "projector", "self", "cross", "embedding"]}),
    "lengths of rows": (2, {**FEW, "lora": {"dora": True}}),
    "the encoder's adapters": (2, {**FEW, "lora": {"targets": ["vision", "projector"]}, "recompute": True}),
    "copies of shards of parts": (
        4, {**FEW, "lora": {"targets": ["all-linear"]}, "parallel": {"tensor_parallel": 2}}
    ),
    "parts": (2, {**FULL, "parallel": {"method": "ddp", "tensor_parallel": 2}, "recompute": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_every_mixture_learns_what_one_process_learns(name: str, make: Make, ranks: Ranks) -> None:
    count, changes = OTHERS[name]
    wanted = make(f"{name} alone", **{**changes, "parallel": {}})
    loop.train(wanted, lambda progress: None)
    run = make(name, **{**changes, "parallel": {"method": "fsdp", **changes.get("parallel", {})}})
    ranks(count, run_here, run)
    for key in ("loss", "gradient_norm"):
        assert metrics(run, key) == pytest.approx(metrics(wanted, key), abs=1e-4, rel=1e-4), key
    ends = [whole(r) for r in (run, wanted)]
    for key, value in ends[1].items():
        torch.testing.assert_close(ends[0][key], value, rtol=0, atol=2e-4, msg=key)


def whole(run: ChatRecipe) -> dict[str, torch.Tensor]:
    """What a run has learnt."""
    task = run.to_export().task(Alone())
    path = checkpoint.last_path(run.checkpoints)
    assert path is not None
    if run.parallel.cuts:
        shards.load_whole(path, task.modules)
        return {name: value.detach() for name, value in trained(task.modules).items()}
    return dict(checkpoint.load(path).weights)
