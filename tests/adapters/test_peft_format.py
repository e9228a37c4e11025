"""Adapters in files: what is read, what is refused, and that nothing is half-written. `parity/test_peft.py` holds them
against PEFT."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_for_tests import adapted, add, differ, logits
from safetensors.torch import load_file, save_file
from small_model import random_model
from torch import Tensor

from llama_multimodal import load_adapter, merge_lora, save, save_adapter, use_adapter
from llama_multimodal.adapters.lora import adapter_names, adapter_pairs
from llama_multimodal.errors import CheckpointError, ConfigError
from llama_multimodal.quant.pack import pack

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


def change(folder: Path, **values: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_tensors(folder: Path, do: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / TENSORS)
    do(tensors)
    save_file(tensors, folder / TENSORS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(adapted(torch.float32, targets="self"), tmp_path)
    return tmp_path


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_round_trip(dtype: torch.dtype, dora: bool, tmp_path: Path) -> None:
    more: dict[str, Any] = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"vision": 3}, "rslora": True}
    model = adapted(dtype, targets=("all-linear", "lm_head"), dora=dora, dropout=0.1, **more)
    save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, TENSORS]
    again = random_model(dtype=dtype)
    assert load_adapter(again, tmp_path, "mine", dtype="model") is again
    assert torch.equal(logits(again), logits(model)) and adapter_names(again) == ("mine",)
    first, second = adapter_pairs(model, "default"), adapter_pairs(again, "mine")
    assert first.keys() == second.keys()
    for path, pair in second.items():
        assert (pair.scale, pair.dropout) == (first[path].scale, 0.1)
    save_adapter(again, tmp_path / "again", "mine")
    stored, twice = (load_file(where / TENSORS) for where in (tmp_path, tmp_path / "again"))
    assert stored.keys() == twice.keys() and all(torch.equal(stored[key], twice[key]) for key in stored)
    assert json.loads((tmp_path / CONFIG).read_text()) == json.loads((tmp_path / "again" / CONFIG).read_text())


def test_a_packed_base_has_the_same_file(tmp_path: Path) -> None:
    plain, packed = random_model(), pack(random_model(), "bf16")
    for model in (plain, packed):
        add(model, "default", targets=("self", "mlp"), dtype="float32")
    save_adapter(plain, tmp_path / "plain")
    save_adapter(packed, tmp_path / "packed")
    a, b = (load_file(tmp_path / where / TENSORS) for where in ("plain", "packed"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    other = pack(random_model(), "bf16")
    load_adapter(other, tmp_path / "plain")
    assert torch.equal(logits(other), logits(packed))


def test_training_goes_on(folder: Path) -> None:
    model = random_model()
    load_adapter(model, folder, "frozen")
    assert not any(value.requires_grad for value in model.parameters())
    load_adapter(model, folder, "trained", trainable=True)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained and all(".lora.trained." in name for name in trained)


def test_several_and_merged(folder: Path, tmp_path: Path) -> None:
    model = random_model()
    load_adapter(model, folder, "a")
    add(model, "b", 5, targets="mlp")
    with use_adapter(model, "b"):
        other = logits(model)
    first = logits(model)
    merge_lora(model, "b")
    save_adapter(model, tmp_path / "b", "b")  # of a merged model too
    again = random_model()
    load_adapter(again, tmp_path / "b")
    assert differ(logits(again), other) < 1e-5 < differ(first, other)
    with pytest.raises(ConfigError, match="merged"):
        load_adapter(model, folder, "c")


def test_into_the_folder_of_a_model(tmp_path: Path) -> None:
    """Its weights stay; an older adapter goes."""
    save(random_model(), None, tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"old")
    before = {path.name for path in tmp_path.iterdir()}
    save_adapter(adapted(torch.float32), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before - {"adapter_model.bin"} | {CONFIG, TENSORS}


def test_a_full_disk_leaves_the_old_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="is full; free some space"):
            save_adapter(adapted(torch.float32, seed=3), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- what PEFT's files say besides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"base_model_name_or_path": "meta-llama/x", "revision": "main", "peft_version": "0.21.2", "task_type": None},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "loftq_config": {}, "corda_config": None},
        {"target_modules": "all-linear", "exclude_modules": ["lm_head"], "layers_pattern": "layers"},
        {"layers_to_transform": [0, 2, 4]},
        {"megatron_config": None, "megatron_core": "megatron.core", "use_qalora": False, "qalora_group_size": 16},
        {"a_setting_of_the_future": None, "another": False, "and_another": []},
    ],
    ids=lambda values: next(iter(values)),
)
def test_settings_that_change_nothing(values: dict[str, Any], folder: Path) -> None:
    expected = random_model()
    load_adapter(expected, folder)
    change(folder, **values)
    model = random_model()
    load_adapter(model, folder)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], which is not implemented"),
        ({"bias": "all"}, "bias is 'all'; only \"none\" is implemented"),
        ({"lora_bias": True}, "lora_bias is True, which is not implemented"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is"),
        ({"target_parameters": ["experts"]}, "target_parameters is"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is"),
        ({"a_setting_of_the_future": 2}, "a_setting_of_the_future is 2, which is not implemented"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base too; let PEFT convert"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only \"LORA\" is read"),
        ({"r": 0}, "the rank r must be a whole number of at least 1, not 0"),
        ({"r": "4"}, "the rank r must be a whole number"),
        ({"rank_pattern": {"q_proj": 1.5}}, "the rank q_proj must be a whole number"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must be a table"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is no regular expression"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number, not 'x'"),
        ({"lora_dropout": 2}, "dropout must be at least 0 and below 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_are_refused(values: dict[str, Any], message: str, folder: Path) -> None:
    change(folder, **values)
    model = random_model()
    before = logits(model)
    with pytest.raises(ConfigError, match=message):
        load_adapter(model, folder)
    assert torch.equal(logits(model), before) and adapter_names(model) == ()


# --- what does not fit -----------------------------------------------------------------------------------------------


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for key in [key for key in tensors if old in key]:
        tensors[key.replace(old, new)] = tensors.pop(key)


@pytest.mark.parametrize(
    ("do", "problems"),
    [
        (lambda t: t.pop(f"{KEY}.lora_B.weight"), ["layers.0.self_attn.q_proj: B is missing"]),
        (
            lambda t: rename(t, "layers.0.", "layers.9."),
            [r"layers\.9\.self_attn\.q_proj\.lora_A.*: this model has no"],
        ),
        (lambda t: rename(t, "lora_A.weight", "lora_C.weight"), ["lora_C.weight: this model has no such layer"]),
        (lambda t: rename(t, "base_model.model.", ""), ["this model has no such layer"]),
        (
            lambda t: t.update(
                {f"{KEY}.lora_A.weight": torch.zeros(4, 31), f"{KEY}.lora_B.weight": torch.zeros(32, 5)}
            ),
            [r"q_proj\.lora_A\.weight: \[4, 31\] found, \[4, 32\] expected", r"\[32, 5\] found, \[32, 4\] expected"],
        ),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int8)}),
            ["torch.int8 found, a floating-point dtype expected"],
        ),
        (
            lambda t: t.update({f"{KEY}.lora_magnitude_vector": torch.zeros(32)}),
            ["lora_magnitude_vector: there without use_dora"],
        ),
        (lambda t: t.clear(), ["it holds no tensors"]),
        (
            lambda t: t.update({f"{KEY}.base_layer.weight": torch.zeros(32, 32)}),
            ["base_layer.weight: it belongs to a model with another"],
        ),
    ],
    ids=["no B", "no layer", "no part", "no prefix", "shapes", "dtype", "magnitude", "nothing", "another base"],
)
def test_one_error_lists_what_does_not_fit(do: Any, problems: list[str], folder: Path) -> None:
    change_tensors(folder, do)
    model = random_model()
    for problem in problems:
        with pytest.raises(CheckpointError, match=rf"does not fit this model \(\d+ problems\):\n(.*\n)*.*{problem}"):
            load_adapter(model, folder)
    assert adapter_names(model) == ()


def test_the_base_may_be_stored_along(folder: Path) -> None:
    """PEFT does so for an LM head."""
    weight = random_model().get_parameter("decoder.layers.0.attention.qkv.q_proj.weight").detach()
    change_tensors(folder, lambda t: t.update({f"{KEY}.base_layer.weight": weight}))
    for model in (random_model(), pack(random_model(dtype=torch.float32), "bf16")):
        if model.decoder.layers[0].attention.qkv.product is None:
            load_adapter(model, folder)
        else:  # whose values were rounded
            with pytest.raises(CheckpointError, match="another model"):
                load_adapter(model, folder)


def test_long_lists_are_cut(folder: Path) -> None:
    change(folder, r=3)
    with pytest.raises(CheckpointError, match=r"\(24 problems\)(.*\n)*.*… and 4 more"):
        load_adapter(random_model(), folder)


def test_dora_without_its_lengths(folder: Path) -> None:
    change(folder, use_dora=True)
    with pytest.raises(CheckpointError, match="q_proj: magnitude is missing"):
        load_adapter(random_model(), folder)


def test_layers_that_were_not_to_be_transformed(folder: Path) -> None:
    change(folder, layers_to_transform=[0, 4])
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.q_proj: not among layers_to_transform"):
        load_adapter(random_model(), folder)


def test_values_that_are_not_finite(folder: Path) -> None:
    change_tensors(folder, lambda t: t[f"{KEY}.lora_A.weight"].fill_(torch.nan))
    with pytest.raises(CheckpointError, match="q_proj holds values that are not finite"):
        load_adapter(random_model(), folder)


def test_folders_that_hold_none(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere holds no adapter: there is no adapter_config"):
        load_adapter(random_model(), tmp_path / "nowhere")
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(
        CheckpointError, match=r"adapter_model\.bin is a pickle and is not read\); save it as safetensors"
    ):
        load_adapter(random_model(), folder)
    (folder / TENSORS).write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(CheckpointError, match="is a pickle and not a safetensors file"):
        load_adapter(random_model(), folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        load_adapter(random_model(), folder)


def test_saving_an_adapter_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this model has no adapter"):
        save_adapter(random_model(), tmp_path)
    with pytest.raises(ConfigError, match='no adapter "default"; the model has receipts'):
        save_adapter(adapted(name="receipts"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_adapter(adapted(), tmp_path / "file")
