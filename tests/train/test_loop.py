"""The training loop itself, on a toy task: a step against one written by hand, kills, resuming, and what goes wrong."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from toy_task import ToyRecipe, ToyTask, run_toy

from llama_multimodal.errors import CheckpointError, ConfigError, MissingExtraError, TrainingError
from llama_multimodal.train import checkpoint, loop, watch
from llama_multimodal.train.config import OptimConfig, Progress, WatchConfig
from llama_multimodal.train.guard import fits, seed_step
from llama_multimodal.train.optim import scheduled
from llama_multimodal.train.parallel import Group

OPTIM = OptimConfig(learning_rate=1e-2, weight_decay=0.1, warmup_steps=2, schedule="cosine")


def toy(folder: Path, **changes: object) -> ToyRecipe:
    base = ToyRecipe(output=str(folder), steps=6, optim=OPTIM, save_every=2)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def losses(recipe: ToyRecipe) -> list[float]:
    return [progress.values["loss"] for progress in watch.lines(Path(recipe.output))]


def final(recipe: ToyRecipe) -> dict[str, torch.Tensor]:
    saved = checkpoint.load(checkpoint.last_path(recipe.checkpoints))
    assert saved is not None and saved.step == recipe.steps
    return dict(saved.weights)


def test_steps_equal_a_loop_written_by_hand(tmp_path: Path) -> None:
    recipe = toy(tmp_path, steps=3, dropout=0.0)
    loop.train(recipe, lambda progress: None)
    task = ToyTask(recipe, Group())
    model = task.modules
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.999)
    )
    for step, pieces in enumerate(task.batches(0)):
        x, labels = torch.cat([p.x for p in pieces]), torch.cat([p.labels for p in pieces])
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        done = max(0, step - 2) / 1
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 2) * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.step()
        optimizer.zero_grad()
        assert losses(recipe)[step] == pytest.approx(loss.item(), abs=1e-6)
    for name, value in model.named_parameters():
        torch.testing.assert_close(final(recipe)[name], value.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path, optimizer: str) -> None:
    """Bitwise, with dropout and averaged weights."""
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    optim = dataclasses.replace(OPTIM, optimizer=optimizer, ema_decay=0.9)
    whole, parts = (toy(tmp_path / name, optim=optim) for name in ("whole", "parts"))
    loop.train(whole, lambda progress: None)

    def die(progress: Progress) -> None:
        if progress.step in (3, 5):
            raise InterruptedError

    for _ in range(2):
        with pytest.raises(InterruptedError):
            loop.train(parts, die)
    loop.train(parts, lambda progress: None)
    assert losses(parts) == losses(whole) and len(losses(whole)) == 6
    ends = [checkpoint.load(checkpoint.last_path(recipe.checkpoints)) for recipe in (whole, parts)]
    for name, value in ends[0].weights.items():  # type: ignore[union-attr]
        assert torch.equal(value, ends[1].weights[name]), name  # type: ignore[union-attr]
        assert torch.equal(ends[0].average[name], ends[1].average[name]), name  # type: ignore[union-attr,index]
        assert not torch.equal(value, ends[0].average[name]), name  # type: ignore[union-attr,index]


def test_kills_at_any_moment(tmp_path: Path) -> None:
    """kill -9, mostly while a step is being saved: what is saved can be read, and the losses are those of one run."""
    whole, killed = (toy(tmp_path / name, steps=40, save_every=1) for name in ("whole", "killed"))
    loop.train(whole, lambda progress: None)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llama_multimodal.train.loop"])
    metrics, moment = Path(killed.output) / "metrics.jsonl", random.Random(5)
    for _ in range(3):
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        process = context.Process(target=run_toy, args=(killed,))
        process.start()
        until = time.monotonic() + 120
        while (not metrics.exists() or metrics.stat().st_mtime_ns == before) and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(moment.uniform(0.0, 0.1))
        process.kill()
        process.join()
        for path in checkpoint.saved_steps(killed.checkpoints).values():
            checkpoint.load(path)
    process = context.Process(target=run_toy, args=(killed,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert losses(killed) == losses(whole)
    for name, value in final(whole).items():
        assert torch.equal(value, final(killed)[name]), name


def test_saving_leaves_something_whole_wherever_it_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at each of its calls to the system in turn, and once with the target there already."""

    def saved(step: int) -> checkpoint.Saved:
        return checkpoint.Saved(step, {"w": torch.full((3,), float(step))}, None, {"best": None})

    names = ("replace", "fsync")
    calls, stop = 0, 10**9

    def watched(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls > stop:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(os, name, call)

    for name in names:
        watched(name)
    for stop in range(30):
        folder = tmp_path / str(stop)
        monkeypatch.undo()
        checkpoint.save(folder, saved(1))
        for name in names:
            watched(name)
        calls = 0
        try:
            checkpoint.save(folder, saved(2))
            checkpoint.prune(folder, keep_last=1)
        except KeyboardInterrupt:
            pass
        else:
            assert stop > 4
            assert list(checkpoint.saved_steps(folder)) == [2]
            assert not [path for path in folder.iterdir() if path.name.startswith(".")]
            break
        found = checkpoint.load(checkpoint.last_path(folder))
        assert found is not None and found.weights["w"].tolist() == [float(found.step)] * 3
    else:
        pytest.fail("saving never came to its end")


def test_what_is_kept(tmp_path: Path) -> None:
    recipe = toy(tmp_path, steps=8, save_every=1, keep_last=2, evaluate_every=2, scores=(3.0, 1.0, 2.0, 2.5))
    loop.train(recipe, lambda progress: None)
    assert list(checkpoint.saved_steps(recipe.checkpoints)) == [4, 7, 8]
    best = checkpoint.load(checkpoint.saved_steps(recipe.checkpoints)[4])
    for result, step in (("best", 4), ("last", 8)):
        loop.export(dataclasses.replace(recipe, result=result))
        wanted = best.weights if step == 4 else final(recipe)
        found = torch.load(tmp_path / "result.pt")
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert (tmp_path / "recipe.yaml").exists() and (tmp_path / "versions.json").exists()


def test_damaged_and_foreign_checkpoints(tmp_path: Path) -> None:
    recipe = toy(tmp_path, steps=2)
    loop.train(recipe, lambda progress: None)
    (path,) = checkpoint.saved_steps(recipe.checkpoints).values()
    weights = path / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    with pytest.raises(CheckpointError, match=r"cannot resume from .*move it away"):
        loop.train(recipe, lambda progress: None)
    weights.write_bytes(whole)
    saved = checkpoint.load(path)
    checkpoint.save(recipe.checkpoints, dataclasses.replace(saved, weights={"2.weight": saved.weights["2.weight"]}))
    with pytest.raises(CheckpointError, match="begun by another recipe: this one trains"):
        loop.train(recipe, lambda progress: None)
    checkpoint.save(recipe.checkpoints, saved)
    with pytest.raises(CheckpointError, match="with the optimizer adamw, and this one has muon; take another output"):
        loop.train(dataclasses.replace(recipe, optim=OptimConfig("muon")), lambda progress: None)
    with pytest.raises(CheckpointError, match="does not say its best; move it away"):
        state = {name: value for name, value in saved.state.items() if name != "best"}
        checkpoint.save(recipe.checkpoints, dataclasses.replace(saved, state=state))
        loop.train(recipe, lambda progress: None)
    with pytest.raises(CheckpointError, match="holds no saved run; train it first"):
        loop.export(toy(tmp_path / "none"))


def test_processes_take_the_same_steps_as_one(tmp_path: Path) -> None:
    """As torchrun starts them: by the environment; without dropout, whose draws differ."""
    one, two = (toy(tmp_path / name, steps=3, dropout=0.0) for name in ("one", "two"))
    loop.train(one, lambda progress: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "from pathlib import Path\nfrom test_loop import toy\nfrom toy_task import run_toy\n"
        f"run_toy(toy(Path({str(tmp_path / 'two')!r}), steps=3, dropout=0.0))\n"
    )
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **places, "PYTHONPATH": path, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in started] == [0, 0]
    assert losses(two) == pytest.approx(losses(one), abs=1e-5) and len(losses(two)) == 3
    for name, value in final(one).items():
        torch.testing.assert_close(final(two)[name], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows_at_once", [1, 3, 8])
def test_micro_batches_add_up_to_the_step(tmp_path: Path, rows_at_once: int) -> None:
    whole, parts = (toy(tmp_path / str(rows), steps=3, dropout=0.0, rows_at_once=rows) for rows in (100, rows_at_once))
    for recipe in (whole, parts):
        loop.train(recipe, lambda progress: None)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-6)


def test_float16_leaves_out_steps_that_leave_its_range(tmp_path: Path) -> None:
    seen: list[Progress] = []
    recipe = toy(tmp_path, dtype="float16", steps=14, loss_scale=300.0, optim=dataclasses.replace(OPTIM, clip_norm=1e9))
    loop.train(recipe, seen.append)
    skipped = ["skipped" in progress.values for progress in seen]
    assert skipped[0] and not skipped[-1] and skipped == sorted(skipped, reverse=True)
    plain = toy(tmp_path / "plain", dtype="float16", steps=3)
    loop.train(plain, lambda progress: None)
    full = toy(tmp_path / "full", steps=3)
    loop.train(full, lambda progress: None)
    assert losses(plain) == pytest.approx(losses(full), abs=5e-3)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    recipe = toy(tmp_path, poison=(3, 5))
    with pytest.raises(TrainingError) as caught:
        loop.train(recipe, lambda progress: None)
    message = str(caught.value)
    assert "step 4: the loss is not finite; the first was the output of 0, in the rows row 5;" in message
    assert "the last good step is" in message and "step-00000002" in message and "\n" not in message
    assert list(checkpoint.saved_steps(recipe.checkpoints)) == [2]
    assert len(losses(recipe)) == 3


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    recipe = toy(tmp_path, steps=2)
    loop.train(recipe, lambda progress: None)
    (path,) = checkpoint.saved_steps(recipe.checkpoints).values()
    saved = checkpoint.load(path)
    saved.weights["2.bias"][1] = float("inf")
    checkpoint.save(recipe.checkpoints, saved)
    with pytest.raises(TrainingError, match="the output of 2, whose bias is not finite, in the rows"):
        loop.train(dataclasses.replace(recipe, steps=4), lambda progress: None)


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Root(ToyTask):
        """√x at 0: the value is finite, its slope is not."""

        def loss(self, micro, totals, step):  # type: ignore[no-untyped-def]
            loss, sums = super().loss(micro, totals, step)
            return loss + (self.modules[2].bias * 0).sum().sqrt(), sums

    monkeypatch.setattr(ToyRecipe, "task", lambda self, group: Root(self, group))
    with pytest.raises(TrainingError, match=r"step 1: the gradient of 2.bias is not finite; no step was saved yet"):
        loop.train(toy(tmp_path), lambda progress: None)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), RuntimeError("[enforce] can't allocate memory: you")])
def test_a_batch_that_does_not_fit(tmp_path: Path, error: Exception) -> None:
    task = ToyTask(toy(tmp_path), Group())
    (batch, *_) = next(task.batches(0))
    with (
        pytest.raises(
            TrainingError, match=r"step 3 does not fit in the memory of cpu: .* of 4 rows \(row 0, row 1, row 2"
        ),
        fits(task, batch, 2),
    ):
        raise error
    with pytest.raises(RuntimeError, match="shapes"), fits(task, batch, 2):
        raise RuntimeError("shapes")


def test_schedules() -> None:
    def rates(**settings: object) -> list[float]:
        optim = OptimConfig(warmup_steps=2, **settings)  # type: ignore[arg-type]
        return [round(scheduled(1.0, step, 10, optim), 6) for step in range(10)]

    assert rates(schedule="constant") == [0.5] + [1.0] * 9
    assert rates(schedule="constant", decay_steps=4)[5:] == [1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(schedule="linear") == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    cosine = rates(schedule="cosine", final_share=0.1)
    assert cosine[2] == 1.0 and cosine[6] == pytest.approx(0.55) and cosine[9] == pytest.approx(0.134254, abs=1e-5)


def test_each_step_draws_its_own_random_numbers() -> None:
    draws = []
    for place in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0), (0, 0, 0)):
        seed_step(*place)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[4] and len(set(draws)) == 4


def test_metrics_that_a_kill_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(watch.line(Progress(1, {"loss": 2.0})) + watch.line(Progress(2, {"loss": 1.0})) + '{"step": 3, "lo')
    assert [progress.step for progress in watch.lines(tmp_path)] == [1, 2]
    with watch.Watch(tmp_path, 1) as log:
        log.log(Progress(2, {"loss": 0.5}))
    assert [(p.step, p.values["loss"]) for p in watch.lines(tmp_path)] == [(1, 2.0), (2, 0.5)]


def test_deterministic_runs_switch_it_on_and_off(tmp_path: Path) -> None:
    seen: list[bool] = []
    recipe = toy(tmp_path, steps=1, deterministic=True)
    loop.train(recipe, lambda progress: seen.append(torch.are_deterministic_algorithms_enabled()))
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()


def test_boards_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for wanted in (WatchConfig(tensorboard=True), WatchConfig(wandb="project")):
        with pytest.raises(MissingExtraError, match=r"\[watch\]"):
            loop.train(toy(tmp_path, watch=wanted), lambda progress: None)


def test_boards_get_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both as stand-ins: what they are called with, in their libraries' own terms."""
    calls: list[tuple[object, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append(("begin", purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            if name == "loss":
                calls.append(("board", step, value))

        def close(self) -> None:
            calls.append(("close",))

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append(("wandb", step, values["loss"]))

        def finish(self) -> None:
            calls.append(("finish",))

    class Wandb:
        @staticmethod
        def init(**settings: object) -> Run:
            assert settings["project"] == "toys" and settings["config"]["steps"] == 2  # type: ignore[index]
            return Run()

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", Wandb)  # type: ignore[arg-type]
    recipe = toy(tmp_path, steps=2, watch=WatchConfig(tensorboard=True, wandb="toys"))
    loop.train(recipe, lambda progress: None)
    first, second = losses(recipe)
    steps = [("board", 1, first), ("wandb", 1, first), ("board", 2, second), ("wandb", 2, second)]
    assert calls == [("begin", 1), *steps, ("close",), ("finish",)]


def test_numbers_that_make_no_sense(tmp_path: Path) -> None:
    for change, message in (
        ({"steps": 0}, "steps must be at least 1"),
        ({"keep_last": 0}, "keep_last must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            toy(tmp_path, **change)
    with pytest.raises(ConfigError, match="clip_norm must be above 0"):
        OptimConfig(clip_norm=0)
    with pytest.raises(ConfigError, match="learning_rate is 0"):
        OptimConfig(learning_rate=0, learning_rates={"vision": 1.0})
