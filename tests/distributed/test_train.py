"""Training by a recipe on several processes: whatever way they share the model, they take the steps of one process."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Group, Ranks
from runs import CONFIGS, make_model, step_batches, take_step
from safetensors.torch import load_file
from train_runs import recipe, run_here, write_base, write_recipe, write_rows

import llama_multimodal
from llama_multimodal import cli, load
from llama_multimodal.distributed import (
    ParallelConfig,
    alike,
    fill_parameter,
    local_part,
    make_mesh,
    parallelize,
    shard_model,
)
from llama_multimodal.errors import CheckpointError, ConfigError, UserError
from llama_multimodal.models import LanguageModel, build_model
from llama_multimodal.train import checkpoint, loop, watch
from llama_multimodal.train.chat.in_parts import give_memory
from llama_multimodal.train.chat.recipe import ChatRecipe
from llama_multimodal.train.config import ParallelOptions, read_table
from llama_multimodal.train.parallel import Group as Alone
from llama_multimodal.train.record import write_record
from llama_multimodal.train.state import RunState, load_result
from llama_multimodal.train.task import trained

WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"method": "ddp"},
    "fsdp": {"method": "fsdp"},
    "tensor": {"method": "ddp", "tensor_parallel": 2},
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


@pytest.fixture(scope="module")
def one(make: Make) -> ChatRecipe:
    run = make("one", steps=10)
    loop.train(run, lambda progress: None)
    loop.export(run)
    return run


LEGS = {2: "ddp", 4: "fsdp", 6: "tensor", 7: "fsdp", 8: "ddp", 9: "tensor"}
"""How two processes share the model until which step: every way goes on with what every other has saved."""


def test_a_run_goes_on_whichever_way_its_processes_share_the_model(make: Make, one: ChatRecipe, two: Group) -> None:
    """They take the steps of one process that never stops, and evaluate as it does; one process ends the run."""
    for end, way in LEGS.items():
        run = make("legs", steps=end, evaluate={"every": 2 if end <= 6 else 0}, parallel=WAYS[way])
        two(run_here, run)
        for key in ("loss", "gradient_norm", "learning_rate", "learnt_tokens"):
            rel = 3e-5 if key == "gradient_norm" else None  # a sum over all weights, in another order
            assert metrics(run, key) == pytest.approx(metrics(one, key)[:end], abs=1e-5, rel=rel), (way, end, key)
    for key in ("eval_loss", "eval_exact_match", "eval_anls"):
        assert metrics(run, key) == pytest.approx(metrics(one, key)[:3], abs=1e-5), key
    assert len(metrics(run, "eval_loss")) == 3
    kept = checkpoint.saved_steps(run.checkpoints)  # the best and the last two, of which ddp saved one, whole
    assert {step: (path / "weights.safetensors").exists() for step, path in kept.items()} == {
        6: False,
        8: True,
        9: False,
    }
    run = make("legs", steps=10, evaluate={"every": 0})
    loop.train(run, lambda progress: None)
    loop.export(run)
    assert metrics(run) == pytest.approx(metrics(one), abs=1e-5)
    # Adam divides a gradient by its own size: what a neuron that hardly fires learns in ten steps is rounding too. So a
    # few values may be further off than all others.
    assert_same_adapter(run, one, atol=1e-4)
    ours, theirs = (torch.cat([value.flatten() for _, value in sorted(adapter(r).items())]) for r in (run, one))
    assert ((ours - theirs).abs() > 1e-5).float().mean() < 0.005


def adapter(run: ChatRecipe) -> dict[str, torch.Tensor]:
    return load_file(Path(run.output) / "adapter" / "adapter_model.safetensors")


def assert_same_adapter(run: ChatRecipe, wanted: ChatRecipe, atol: float = 1e-5) -> None:
    assert adapter(run).keys() == adapter(wanted).keys()
    for name, value in adapter(wanted).items():
        torch.testing.assert_close(adapter(run)[name], value, rtol=0, atol=atol, msg=name)
    ours, theirs = (json.loads((Path(r.output) / "adapter/adapter_config.json").read_text()) for r in (run, wanted))
    assert ours == theirs


FULL = {"method": "full", "steps": 2, "evaluate": {"every": 0}, "optim": {"learning_rate": 1e-3, "ema_decay": None}}
FEW = {"steps": 2, "evaluate": {"every": 0}}
WIDE = {**FEW, "lora": {"targets": ["all-linear"]}}
OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "all weights, packed": (2, {**FULL, "batch": {"packing": True, "tokens": 60}, "recompute": True}),
    "a frozen encoder, kept gathered": (
        2, {**FULL, "freeze": ["vision"], "parallel": {"reshard_after_forward": False}}
    ),
    "the head alone": (2, {**FULL, "freeze": ["vision", "projector", "self", "cross", "embedding"]}),
    "lengths of rows": (2, {"steps": 2, "evaluate": {"every": 1, "answers": 0}, "lora": {"dora": True}}),
    "the encoder's adapters": (2, {**FEW, "lora": {"targets": ["vision", "projector"]}, "recompute": True}),
    "copies of shards": (4, {**WIDE, "parallel": {"replicas": 2}}),
    "shards of parts": (4, {**WIDE, "parallel": {"tensor_parallel": 2}}),
    "distilled rows": (2, {**WIDE, "distill": True, "steps": 4}),
    "distilled rows, parts": (2, {**WIDE, "distill": True, "parallel": WAYS["tensor"]}),
    "parts": (2, {**FULL, "parallel": {"method": "ddp", "tensor_parallel": 2}, "recompute": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_every_mixture_learns_what_one_process_learns(name: str, make: Make, ranks: Ranks) -> None:
    count, changes = OTHERS[name]
    wanted = make(f"{'four' if count == 4 else name} alone", **{**changes, "parallel": {}})
    loop.train(wanted, lambda progress: None)  # of those with four processes, the first time
    run = make(name, **{**changes, "parallel": {"method": "fsdp", **changes.get("parallel", {})}})
    ranks(count, run_here, run)
    for key in ("loss", "gradient_norm", "eval_loss"):
        assert metrics(run, key) == pytest.approx(metrics(wanted, key), abs=1e-4, rel=1e-4), key
    ends = [whole(r) for r in (run, wanted)]
    for key, value in ends[1].items():
        torch.testing.assert_close(ends[0][key], value, rtol=0, atol=2e-4, msg=key)


def whole(run: ChatRecipe) -> dict[str, torch.Tensor]:
    """What a run has learnt."""
    path = checkpoint.last_path(run.checkpoints)
    assert path is not None
    if not run.parallel.cuts:
        return dict(checkpoint.load(path).weights)
    task = run.to_export().task(Alone())
    load_result(path, task)
    return {name: value.detach() for name, value in trained(task.modules).items()}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_half_precision_stays_near(method: str, make: Make, two: Group) -> None:
    """Weights that learn are held in float32, gathered in bfloat16, and answer so."""
    optim = {"learning_rate": 1e-3}
    changes: dict[str, Any] = {"method": method, "dtype": "bfloat16", "steps": 2, "optim": optim, "result": "best"}
    changes["evaluate"] = {"rows": 3, "answers": 1, "max_new_tokens": 2}
    wanted = make(f"half {method} alone", **changes)
    loop.train(wanted, lambda progress: None)
    run = make(f"half {method}", **changes, parallel={"method": "fsdp"})
    two(run_here, run)
    for key in ("loss", "eval_loss"):
        assert metrics(run, key) == pytest.approx(metrics(wanted, key), rel=0.02), key
    assert len(metrics(run, "eval_anls")) == 1
    assert {value.dtype for value in whole(run).values()} == {torch.float32}
    result = loop.export(run)
    if method == "full":
        model, processor = load(result)
        assert model.dtype == load(run.model)[0].dtype and processor.tokenizer is not None
        saved = load_result(checkpoint.saved_steps(run.checkpoints)[2], run.to_export().task(Alone()))
        assert saved is not None  # averaged weights are the result
        for name, value in model.named_parameters():
            torch.testing.assert_close(value, saved[name].to(value.dtype), rtol=0, atol=0)


def held(run: ChatRecipe, where: str) -> tuple[int, int]:
    """Numbers that this process has of the parameters with such names, and that the model has."""
    group = Alone.of(make_mesh(run.sharing.mesh(2), "cpu"))
    parameters = [p for name, p in run.task(group).modules.named_parameters() if where in name]
    return sum(local_part(p).numel() for p in parameters), sum(p.numel() for p in parameters)


@pytest.mark.parametrize(("way", "where"), [("fsdp", ""), ("tensor", "_proj.base")])
def test_a_process_has_memory_for_its_part_alone(way: str, where: str, make: Make, two: Group) -> None:
    """Embedding, head and norms are whole beside tensor parts."""
    for part, whole in two(held, make(f"part {way}", parallel=WAYS[way]), where):
        assert 0 < part < 0.52 * whole


def filled(name: str, sizes: dict[str, int]) -> tuple[Any, ...]:
    """Losses before and after a step of a model that was cut without memory, then filled."""
    mesh = make_mesh(ParallelConfig(**sizes), "cpu")
    with torch.device("meta"):
        model = build_model(CONFIGS[name]).double()
    parallelize(model, mesh)
    if sizes["shard"] > 1:
        shard_model(model, mesh)
    give_memory(model, torch.device("cpu"))
    for key, value in make_model(name).named_parameters():
        fill_parameter(model.get_parameter(key), value)
    return stepped(name, model, mesh)


def stepped(name: str, model: LanguageModel, mesh: Any = None) -> tuple[Any, ...]:
    optimizer = torch.optim.AdamW([{"params": group} for group in alike(model.parameters())], lr=1e-2)
    return tuple(take_step(model, step_batches(name, 0), optimizer, mesh)[0] for _ in range(2))


@functools.cache
def plainly_stepped(name: str) -> tuple[Any, ...]:
    return stepped(name, make_model(name))


@pytest.mark.parametrize("sizes", [{"shard": 2}, {"shard": 1, "tensor": 2}], ids=str)
@pytest.mark.parametrize("name", ["llama vision", "siglip"])
def test_a_model_that_was_cut_without_memory_is_filled(name: str, sizes: dict[str, int], two: Group) -> None:
    """The second with an LM head that is the embedding, and stays it."""
    wanted = plainly_stepped(name)
    for losses in two(filled, name, sizes):
        assert losses == pytest.approx(wanted, rel=1e-9)


def exchanges(run: ChatRecipe) -> int:
    """How often gradients are exchanged."""
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    plain, count = getattr(dist, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return plain(*args, **kwargs)

    setattr(dist, name, counted)
    try:
        run_here(run)
    finally:
        setattr(dist, name, plain)
    return count


def test_micro_batches_share_one_exchange(make: Make, two: Group) -> None:
    changes = {"steps": 1, "evaluate": {"every": 0}, "parallel": {"method": "fsdp"}}
    several, one = (
        two(exchanges, make(f"{rows} at once", **changes, batch={"rows_at_once": rows})) for rows in (1, 100)
    )
    assert several == one and several[0] == several[1] > 0


# --- what goes wrong --------------------------------------------------------------------------------------------------


def failing(run: ChatRecipe) -> str:
    try:
        run_here(run)
    except (UserError, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_loss_that_is_not_finite_is_explained_once(make: Make, two: Group) -> None:
    run = make("diverging", optim={"learning_rate": 1e30, "ema_decay": None}, parallel={"method": "fsdp"})
    first, second = two(failing, run)
    assert re.match("TrainingError: step 2: the loss is not finite; the first was the output of .*rows.jsonl", first)
    assert second == "SystemExit: 2"


@pytest.mark.parametrize("method", ["ddp", "fsdp"])
def test_of_a_recipe_saved_shapes_must_not_change_and_settings_may(method: str, make: Make) -> None:
    run = make(f"other {method}", steps=1, evaluate={"every": 0}, parallel={"method": method})
    loop.train(run, lambda progress: None)  # one process may be all there are
    other = replace(run, parallel=ParallelOptions("fsdp" if method == "ddp" else "ddp"))
    for lora, why in (({"targets": ("self",)}, "does not train "), ({"rank": 2}, r"has .* as \[2, .*, not \[4, ")):
        with pytest.raises(CheckpointError, match=f"begun by another recipe: this one {why}"):
            loop.train(replace(other, lora=replace(run.lora, **lora)), lambda progress: None)
    decays = replace(run, optim=replace(run.optim, weight_decay=0.7))  # may change: moments are saved, no settings
    state = RunState.of(decays, decays.task(Alone()))
    assert state.resume() == 1
    assert [group["weight_decay"] for group in state.optimizers[0].param_groups] == [0.7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel": {"methd": "fsdp"}}, 'unknown key "methd"; did you mean "method"?'),
        ({"parallel": {"method": "zero"}}, 'method "zero" is not implemented; supported: ddp, fsdp'),
        ({"parallel": {"tensor_parallel": 0}}, "parallel.tensor_parallel must be at least 1, not 0"),
        ({"parallel": {"replicas": 2}}, "replicas and reshard_after_forward are for the method fsdp"),
        ({"parallel": {"method": "fsdp"}, "method": "qlora"}, "fsdp does not cut the 4-bit weights of qlora"),
        (
            {"parallel": {"tensor_parallel": 2}, "optim": {"optimizer": "adamw8bit"}},
            "the optimizer adamw8bit needs whole weights, and tensor_parallel cuts them",
        ),
        ({"parallel": {"method": "fsdp"}, "dtype": "float16"}, "fsdp has no scaled loss, which float16 needs"),
        ({"parallel": {"tensor_parallel": 2}, "lora": {"dora": True}}, "does not cut what dora learns"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(ConfigError) as caught:
        make("wrong", **change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_of_processes_that_do_not_divide(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, count, message in (
        (ParallelOptions(tensor_parallel=2), 1, "tensor_parallel 2 does not divide the 1 process of this run"),
        (
            ParallelOptions("fsdp", 2, 2),
            6,
            "tensor_parallel 2 × replicas 2 does not divide the 6 processes of this run",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            options.mesh(count)
    with pytest.raises(ConfigError, match="does not divide the 1 process of this run; change it, or torchrun's"):
        loop.train(make("alone", parallel={"tensor_parallel": 2}), lambda progress: None)


def test_heads_that_parts_do_not_divide(make: Make, two: Group) -> None:
    tiny = make("heads", model="tiny", parallel={"tensor_parallel": 2})
    for said in two(failing, tiny):
        assert "ConfigError: tensor 2 does not divide decoder.layers.0.attention.num_heads = 3" in said


# --- the command ------------------------------------------------------------------------------------------------------


def train_command(file: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`llama-mm train` as torchrun starts it; `train_command.py` is the command with an accident."""
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (Path(llama_multimodal.__file__).parent.parent, here.parent, here)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--monitor-interval", "0.2", str(here / "train_command.py"), "train", str(file)]
    settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=280)


def test_the_command_goes_on_after_a_failure_and_with_other_numbers_of_processes(
    make: Make, one: ChatRecipe, two: Group
) -> None:
    """Two shards, of which the second fails: the run ends with that process's error and no other. Then one process goes
    on, and two again; against a run that never stopped. `test_mesh` has torchrun start failed processes again."""
    folder = Path(one.output).parent

    def file(steps: int) -> Path:
        made = make("command", steps=steps, save_every=1, evaluate={"every": 0}, parallel={"method": "fsdp"})
        return write_recipe(plain(made), folder / "command.yaml")

    ended = train_command(file(4), FAILS_AT="2")
    assert ended.returncode == 1
    said = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert said == ["error: picture 2 is damaged; leave it out"]
    report = ended.stderr[ended.stderr.index("Root Cause") :]
    assert re.search(r"rank\s*: 1 ", report) and "picture 2 is damaged; leave it out" in report
    with pytest.raises(SystemExit) as done:
        cli.main(["train", str(file(3))])
    assert done.value.code == 0
    first, second = two(command_here, file(4))
    assert first.count("loss curve ") == 1 and second == ""
    run = make("command", steps=4, parallel={"method": "fsdp"})
    assert metrics(run) == pytest.approx(metrics(one)[:4], abs=1e-5)
    assert adapter(run).keys() == adapter(one).keys()


def command_here(file: Path) -> str:
    """`llama-mm train` in the processes that the tests share, as torchrun's; what it prints."""
    rank, count = dist.get_rank(), dist.get_world_size()
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("RANK", str(rank))
        patch.setenv("WORLD_SIZE", str(count))
        with pytest.raises(SystemExit) as done:
            cli.main(["train", str(file)])
    assert done.value.code == 0
    # The command has left the group, and the next test wants one.
    dist.init_process_group("gloo", init_method=f"file://{file}.again", rank=rank, world_size=count)
    return said.getvalue()


def plain(run: ChatRecipe) -> dict[str, Any]:
    """A recipe as its file has it."""
    write_record(run, Path(run.output))
    return dict(read_table(Path(run.output) / "recipe.yaml"))
