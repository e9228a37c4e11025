"""Training by a recipe on several processes: whatever way they share the model, they take the steps of one process."""

from __future__ import annotations

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
from llama_multimodal.train import checkpoint, loop, shards, watch
from llama_multimodal.train.chat.in_parts import give_memory
from llama_multimodal.train.chat.recipe import ChatRecipe
from llama_multimodal.train.config import ParallelOptions, read_table
from llama_multimodal.train.parallel import Group as Alone
from llama_multimodal.train.record import write_record
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


FULL = {"method": "full", "steps": 2, "evaluate": {"every": 0}, "optim": {"learning_rate": 1e-3, "ema_decay": None}}
FEW = {"steps": 2, "evaluate": {"every": 0}}
OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "all weights, packed": (2, {**FULL, "batch": {"packing": True, "tokens": 60}, "recompute": True}),
    "a frozen encoder, kept gathered": (
        2, {**FULL, "freeze": ["vision"], "parallel": {"reshard_after_forward": False}}
    ),
    "the head alone": (2, {**FULL, "freeze": ["vision", "projector", "self", "cross", "embedding"]}),
    "lengths of rows": (2, {"steps": 2, "evaluate": {"every": 1, "answers": 0}, "lora": {"dora": True}}),
    "the encoder's adapters": (2, {**FEW, "lora": {"targets": ["vision", "projector"]}, "recompute": True}),
    "copies of shards": (4, {**FEW, "parallel": {"replicas": 2}}),
    "shards of parts": (
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
    for key in ("loss", "gradient_norm", "eval_loss"):
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


@pytest.mark.parametrize("method", ["full", "lora"])
def test_half_precision_stays_near(method: str, make: Make, two: Group) -> None:
    """Weights that learn are held in float32, gathered in bfloat16, and answer so."""
    optim = {"learning_rate": 1e-3}
    changes: dict[str, Any] = {"method": method, "dtype": "bfloat16", "steps": 2, "optim": optim, "result": "best"}
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
        saved = shards.load_whole(checkpoint.saved_steps(run.checkpoints)[2], run.to_export().task(Alone()).modules)
        assert saved is not None  # averaged weights are the result
        for name, value in model.named_parameters():
            torch.testing.assert_close(value, saved[name].to(value.dtype), rtol=0, atol=0)


def held(run: ChatRecipe) -> tuple[int, int]:
    """Numbers that this process has of the model, and that the model has."""
    group = Alone.of(make_mesh(run.sharing.mesh(2), "cpu"))
    parameters = run.task(group).modules.parameters()
    counts = [(local_part(p).numel(), p.numel()) for p in parameters]
    return sum(part for part, _ in counts), sum(whole for _, whole in counts)


@pytest.mark.parametrize("way", ["fsdp", "tensor"])
def test_a_process_has_memory_for_its_part_alone(way: str, make: Make, two: Group) -> None:
    for part, whole in two(held, make(f"part {way}", parallel=WAYS[way])):
        assert part < (0.52 if way == "fsdp" else 0.8) * whole  # embedding and head are whole beside tensor parts


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


@pytest.mark.parametrize("sizes", [{"shard": 2}, {"shard": 1, "tensor": 2}], ids=str)
@pytest.mark.parametrize("name", ["llama vision", "siglip"])
def test_a_model_that_was_cut_without_memory_is_filled(name: str, sizes: dict[str, int], two: Group) -> None:
    """The second with an LM head that is the embedding, and stays it."""
    wanted = stepped(name, make_model(name))
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


def test_saved_steps_of_the_other_kind_are_refused(make: Make, one: ChatRecipe, two: Group) -> None:
    cut = replace(one, parallel=ParallelOptions("fsdp"))
    with pytest.raises(CheckpointError, match="was saved whole, by a run whose model was not cut"):
        loop.train(cut, lambda progress: None)
    run = make("kinds", steps=1, evaluate={"every": 0}, parallel={"method": "fsdp"})
    loop.train(run, lambda progress: None)  # one process may be all there are
    for act in (lambda r: loop.train(r, lambda progress: None), loop.export):
        with pytest.raises(CheckpointError, match="was saved in parts, by a run whose model was cut"):
            act(replace(run, parallel=ParallelOptions()))
    with pytest.raises(CheckpointError, match="begun by another recipe: this one does not train"):
        loop.train(replace(run, lora=replace(run.lora, targets=("self",))), lambda progress: None)


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


def train_command(file: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`llama-mm train` as torchrun starts it; `train_command.py` is the command with an accident."""
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (Path(llama_multimodal.__file__).parent.parent, here.parent, here)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--monitor-interval", "0.2", *options, str(here / "train_command.py"), "train", str(file)]
    settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **env}
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=280)


def test_the_command_goes_on_after_failures_and_with_other_numbers_of_processes(make: Make, one: ChatRecipe) -> None:
    """Two shards, of which the second fails twice: the first time torchrun starts them again, and they go on from the
    last saved step; the second time the run ends, with that process's error and no other. Then one process goes on, and
    two again; against a run that never stopped."""
    folder = Path(one.output).parent

    def file(steps: int) -> Path:
        made = make("command", steps=steps, parallel={"method": "fsdp"})
        return write_recipe(plain(made), folder / "command.yaml")

    ended = train_command(file(4), "--max-restarts", "1", FAILS_AT="1 2")
    assert ended.returncode == 1
    said = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert said == ["error: picture 1 is damaged; leave it out", "error: picture 2 is damaged; leave it out"]
    report = ended.stderr[ended.stderr.index("Root Cause") :]
    assert re.search(r"rank\s*: 1 ", report) and "picture 2 is damaged; leave it out" in report
    with pytest.raises(SystemExit) as done:
        cli.main(["train", str(file(3))])
    assert done.value.code == 0
    ended = train_command(file(4))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("loss curve ") == 1  # what the first process says
    run = make("command", steps=4, parallel={"method": "fsdp"})
    assert metrics(run) == pytest.approx(metrics(one), abs=1e-5)
    for name, value in adapter(one).items():
        torch.testing.assert_close(adapter(run)[name], value, rtol=0, atol=1e-5, msg=name)


def plain(run: ChatRecipe) -> dict[str, Any]:
    """A recipe as its file has it."""
    write_record(run, Path(run.output))
    return dict(read_table(Path(run.output) / "recipe.yaml"))
