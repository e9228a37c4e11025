"""Runs that go on with another number of processes, cut another way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Group
from runs import CONFIGS, make_batch, make_model, step_batches, take_step

from llama_multimodal import load, save
from llama_multimodal.distributed import (
    ParallelConfig,
    alike,
    full_model,
    full_state,
    latest_run,
    load_full_state,
    load_run,
    make_mesh,
    parallelize,
    save_run,
    shard_model,
)
from llama_multimodal.errors import CheckpointError
from llama_multimodal.models import LanguageModel, build_model

NAMES = ["llama vision", "siglip"]  # the second one with tied embeddings


def built(name: str, sizes: dict[str, int] | None, seed: int) -> Any:
    """A model, its optimizer, and the mesh; sizes: None for one process and no mesh"""
    mesh = None if sizes is None else make_mesh(ParallelConfig(**sizes), "cpu")
    model = make_model(name, seed)
    if mesh is not None:
        parallelize(model, mesh)
        if "shard" in sizes and sizes["shard"] > 1:
            shard_model(model, mesh)
    optimizer = torch.optim.AdamW([{"params": group} for group in alike(model.parameters())], lr=1e-2)
    return model.train(), optimizer, mesh


def go_on(name: str, folder: Path, sizes: dict[str, int] | None, first: int, end: int) -> Any:
    """Steps [first, end), from the folder's latest run where there is one, and save it."""
    model, optimizer, mesh = built(name, sizes, seed=first)
    found = latest_run(folder)
    if found is not None:
        assert load_run(found, model, [optimizer]) == {"next": first}
    losses = [take_step(model, step_batches(name, step), optimizer, mesh)[0] for step in range(first, end)]
    save_run(folder, end, model, [optimizer], extra={"next": end})
    return losses, full_state(model)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_with_any_number_of_processes(name: str, two: Group, tmp_path: Path) -> None:
    """Two shards, then one process, then two tensor parts, then two shards again; against one that never stops."""
    wanted, whole = go_on(name, tmp_path / "unbroken", None, 0, 5)
    folder = tmp_path / "run"
    losses = two(go_on, name, folder, {"shard": 2}, 0, 2)[0][0]
    losses += go_on(name, folder, None, 2, 3)[0]
    losses += two(go_on, name, folder, {"shard": 1, "tensor": 2}, 3, 4)[0][0]
    last, state = two(go_on, name, folder, {"shard": 2}, 4, 5)[0]
    torch.testing.assert_close(torch.tensor(losses + last), torch.tensor(wanted), rtol=1e-9, atol=0)
    assert state.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=1e-7, msg=key)
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in (2, 3, 4, 5)]


def saved_whole(name: str, folder: Path, sizes: dict[str, int]) -> Any:
    model, _, _ = built(name, sizes, seed=0)
    whole = full_model(model)
    if whole is not None:
        save(whole, None, folder)
    return whole is None


@pytest.mark.parametrize("sizes", [{"shard": 2}, {"shard": 1, "tensor": 2}], ids=str)
@pytest.mark.parametrize("name", ["llama vision", "llama"])
def test_a_shared_model_becomes_an_ordinary_checkpoint(name: str, sizes: Any, two: Group, tmp_path: Path) -> None:
    assert two(saved_whole, name, tmp_path, sizes) == [False, True]
    model, _ = load(tmp_path)
    for key, value in make_model(name).named_parameters():  # files hold no fp64
        assert torch.equal(model.get_parameter(key), value.float()), key


def from_first(name: str, folder: Path, sizes: dict[str, int]) -> Any:
    """A model that only the first process ever has whole; its logits."""
    mesh = make_mesh(ParallelConfig(**sizes), "cpu")
    with torch.device("meta"):
        model = build_model(CONFIGS[name]).double()
    parallelize(model, mesh)
    shard_model(model, mesh)
    load_full_state(model, make_model(name).state_dict() if mesh.get_rank() == 0 else {})
    assert sum(parameter.to_local().numel() for parameter in model.parameters()) < 0.8 * len(flat(make_model(name)))
    for key, value, why in (
        ("decoder.norm.weight", torch.ones(3), r"decoder.norm.weight is \[3\] and the model's \[32\]"),
        ("decoder.norm.weigth", torch.ones(32), "decoder.norm.weigth is not one of the model's"),
        ("decoder.norm.weight", None, "decoder.norm.weight is missing"),
    ):
        state = make_model(name).state_dict() | {key: value}
        with pytest.raises(CheckpointError, match=f"do not fit the model: {why}"):
            load_full_state(model, {key: value for key, value in state.items() if value is not None})
    return model(make_batch(name, 0, [1, 2])[0]).logits.detach()


def flat(model: LanguageModel) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("sizes", [{"shard": 2}, {"shard": 1, "tensor": 2}], ids=str)
def test_only_the_first_process_needs_the_whole(sizes: Any, two: Group, tmp_path: Path) -> None:
    wanted = make_model("llama vision")(make_batch("llama vision", 0, [1, 2])[0]).logits
    for logits in two(from_first, "llama vision", tmp_path, sizes):
        torch.testing.assert_close(logits, wanted)


# --- one process is enough for these ----------------------------------------------------------------------------------


def test_the_latest_runs_are_kept(tmp_path: Path) -> None:
    model = make_model("llama")
    assert latest_run(tmp_path) is None
    for step in (1, 2, 10):
        save_run(tmp_path, step, model, keep=2)
    (tmp_path / "step-00000011.partial").mkdir()  # of a run that was killed
    assert latest_run(tmp_path) == tmp_path / "step-00000010"
    assert not (tmp_path / "step-00000001").exists() and (tmp_path / "step-00000002").exists()
    save_run(tmp_path, 11, model)
    assert not (tmp_path / "step-00000011.partial").exists()


def test_what_has_learnt_nothing_yet_begins_after_a_run_is_loaded(tmp_path: Path) -> None:
    """The encoder, by pictures that come with the second step alone."""
    batches = [[make_batch("llama vision", 0, [0, 0])], [make_batch("llama vision", 1, [1, 2])]]
    model, optimizer, _ = built("llama vision", None, seed=0)
    take_step(model, batches[0], optimizer, None)
    assert optimizer.state and not {*model.vision.parameters()} & optimizer.state.keys()
    place = save_run(tmp_path, 1, model, [optimizer])
    other, resumed, _ = built("llama vision", None, seed=1)
    load_run(place, other, [resumed])
    for one, its in ((model, optimizer), (other, resumed)):
        take_step(one, batches[1], its, None)
    assert torch.equal(flat(other), flat(model))


def test_a_model_alone_is_read(tmp_path: Path) -> None:
    model, optimizer, _ = built("llama", None, seed=0)
    take_step(model, step_batches("llama", 0), optimizer, None)
    place = save_run(tmp_path, 1, model, [optimizer], extra={"seen": [1, 2]})
    other = make_model("llama", seed=1)
    assert load_run(place, other) == {"seen": [1, 2]}
    assert torch.equal(flat(other), flat(model))


def test_what_cannot_be_saved_or_read(tmp_path: Path) -> None:
    model = make_model("llama")
    place = save_run(tmp_path, 1, model)
    with pytest.raises(CheckpointError, match="is there already"):
        save_run(tmp_path, 1, model)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_run(tmp_path, 2, model, extra={"optimizer": model})
    assert latest_run(tmp_path) == place
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_run(tmp_path / "file", 1, model)
    with pytest.raises(CheckpointError, match="is no saved run"):
        load_run(tmp_path, model)
    before = flat(model).clone()
    with pytest.raises(CheckpointError, match="does not fit this model, or is damaged"):
        load_run(place, make_model("llama vision"))
    with pytest.raises(CheckpointError, match="does not fit this model, or is damaged"):
        load_run(place, model, [torch.optim.AdamW(model.parameters())])
    (place / ".metadata").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="does not fit this model, or is damaged") as refused:
        load_run(place, model)
    assert "\n" not in str(refused.value) and torch.equal(flat(model), before)
    assert json.loads((place / "extra.json").read_text()) == {}


def test_a_changed_model_is_not_put_together() -> None:
    model = make_model("llama")
    model.decoder.norm = torch.nn.Sequential(model.decoder.norm)
    with pytest.raises(CheckpointError, match="layers were changed"):
        full_model(model)
