"""Writing: what others can read, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_for_tests import hf_tensors, meta_tensors, random_model, same_model
from safetensors import safe_open

from llama_multimodal import load
from llama_multimodal.errors import CheckpointError
from llama_multimodal.models import VisionLanguageModel
from llama_multimodal.weights import save as saving
from llama_multimodal.weights.checkpoint import build_on_meta
from llama_multimodal.weights.convert import convert
from llama_multimodal.weights.save import LEFTOVERS, save_checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_round_trip(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    model = random_model(dtype=dtype)
    save_checkpoint(model, tmp_path / "new" / "folder", layout)  # type: ignore[arg-type]
    again, _ = load(tmp_path / "new" / "folder")
    assert again.dtype == dtype and again.config == model.config and same_model(model, again)
    assert not again.training and all(p.requires_grad for p in again.parameters())


def test_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    save_checkpoint(random_model(dtype=torch.bfloat16), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["torch_dtype"] == "bfloat16" and raw["architectures"] == ["MllamaForConditionalGeneration"]
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [61, 62]
    assert hf_tensors(tmp_path)["vision_model.patch_embedding.weight"].shape == (32, 3, 14, 14)


def test_shards_and_their_index(tmp_path: Path) -> None:
    model = random_model()
    save_checkpoint(model, tmp_path, max_shard_size=50_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert files == sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    for name in files:
        with safe_open(tmp_path / name, "pt") as file:
            assert {key for key, where in index["weight_map"].items() if where == name} == set(file.keys())
            sizes = [file.get_tensor(key).nbytes for key in file.keys()]  # noqa: SIM118
            assert sum(sizes) <= 50_000 or len(sizes) == 1
    assert same_model(load(tmp_path)[0], model)


def test_dtypes_that_differ(tmp_path: Path) -> None:
    """Each tensor keeps its own; the loaded model takes the one that most weights have."""
    model = random_model(dtype=torch.bfloat16)
    model.decoder.norm.float()
    save_checkpoint(model, tmp_path)
    assert hf_tensors(tmp_path)["language_model.model.norm.weight"].dtype == torch.float32
    assert "torch_dtype" not in json.loads((tmp_path / "config.json").read_text())
    again, _ = load(tmp_path)
    assert {value.dtype for value in again.parameters()} == {torch.bfloat16}


def test_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    """The old shards go, so that no mixture remains; other files stay."""
    save_checkpoint(random_model(seed=1), tmp_path, max_shard_size=50_000)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / LEFTOVERS).parent.mkdir()
    (tmp_path / LEFTOVERS).write_text("of the old model")
    second = random_model(seed=2)
    save_checkpoint(second, tmp_path)
    names = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "notes.txt"}
    assert same_model(load(tmp_path)[0], second)


def test_another_layout_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    save_checkpoint(random_model(), tmp_path, "hf")
    with pytest.raises(CheckpointError, match="in another layout"):
        save_checkpoint(random_model(), tmp_path, "meta")


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = random_model(seed=1)
    save_checkpoint(first, tmp_path, layout)  # type: ignore[arg-type]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"disk of .* is full"):
        save_checkpoint(random_model(seed=2), tmp_path, layout)  # type: ignore[arg-type]
    assert same_model(load(tmp_path)[0], first)
    assert not list(tmp_path.glob(".writing-*"))


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_a_crash_between_the_renames_leaves_no_mixture(
    tmp_path: Path, layout: str, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at any of the renames: the old model is back. Killed, so that nothing can be undone: a clear
    error or one of the models."""
    first, second = random_model(seed=1), random_model(seed=2)
    outcomes = set()
    for crash_at in itertools.count():
        folder = tmp_path / str(crash_at)
        save_checkpoint(first, folder, layout, max_shard_size=200_000)  # type: ignore[arg-type]
        crash = Crash(crash_at, killed)
        with monkeypatch.context() as patch:
            patch.setattr(saving.os, "replace", crash.replace)
            patch.setattr(saving.tempfile, "TemporaryDirectory", crash.directory)
            try:
                save_checkpoint(second, folder, layout, max_shard_size=200_000)  # type: ignore[arg-type]
            except KeyboardInterrupt:
                outcome = result(folder, first, second)
                assert outcome == "old" or killed
                outcomes.add(outcome)
            else:
                assert result(folder, first, second) == "new"
                break
    assert outcomes == ({"old", "error"} if killed else {"old"})


class Crash:
    """Stops the `n`-th rename, and where `killed` everything after it."""

    def __init__(self, n: int, killed: bool) -> None:
        self.left, self.killed, self.real, self.temporary = n, killed, os.replace, tempfile.TemporaryDirectory

    def replace(self, source: Path, target: Path) -> None:
        self.left -= 1
        if self.left == -1 or (self.killed and self.left < 0):
            raise KeyboardInterrupt
        self.real(source, target)

    def directory(self, **arguments: Any) -> Any:
        if not self.killed:
            return self.temporary(**arguments)
        return contextlib.nullcontext(tempfile.mkdtemp(**arguments))  # nobody clears it up


def result(folder: Path, first: VisionLanguageModel, second: VisionLanguageModel) -> str:
    try:
        model, _ = load(folder)
    except CheckpointError:
        return "error"
    assert same_model(model, first) or same_model(model, second)
    return "old" if same_model(model, first) else "new"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(random_model(), tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert_into(tmp_path)


def convert_into(tmp_path: Path) -> None:
    save_checkpoint(random_model(), tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "file" / "below", "meta")


def test_a_model_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to save"):
        save_checkpoint(build_on_meta(random_model().config), tmp_path)


def test_a_model_with_other_layers(tmp_path: Path) -> None:
    model = random_model()
    model.projector = torch.nn.Sequential(model.projector)  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="layers were changed"):
        save_checkpoint(model, tmp_path)


def test_metas_file_holds_no_more_than_its_tensors(tmp_path: Path) -> None:
    """`torch.save` writes whole storages: a slice of the embedding must not bring the rest along."""
    save_checkpoint(random_model(), tmp_path, "meta")
    total = sum(value.numel() * 4 for value in meta_tensors(tmp_path).values())
    assert (tmp_path / "consolidated.00.pth").stat().st_size < total + 100_000
