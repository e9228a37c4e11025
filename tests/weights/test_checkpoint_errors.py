"""Checkpoints that do not fit or are damaged: one clear error before anything is read."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_for_tests import GOLDEN, edit_json, hf_tensors, meta_tensors, random_model
from safetensors.torch import save_file

from llama_multimodal.errors import CheckpointError, ConfigError
from llama_multimodal.weights.checkpoint import open_checkpoint
from llama_multimodal.weights.save import save_checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for name, size in (("hf", 10**9), ("sharded", 40_000)):
        save_checkpoint(random_model(), folder / name, max_shard_size=size)
    save_checkpoint(random_model(), folder / "meta", "meta")
    return folder


@pytest.fixture
def hf(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved / "hf", tmp_path / "hf")


@pytest.fixture
def sharded(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved / "sharded", tmp_path / "sharded")


@pytest.fixture
def meta(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved / "meta", tmp_path / "meta")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def refused(folder: Path, pattern: str, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind, match=pattern) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def test_all_problems_in_one_error(hf: Path) -> None:
    tensors = hf_tensors(hf)
    del tensors["multi_modal_projector.bias"]
    tensors["language_model.model.norm.weight"] = torch.zeros(31)
    tensors["what.is.this"] = torch.zeros(2, 3)
    tensors["language_model.lm_head.weight"] = tensors["language_model.lm_head.weight"].to(torch.int8)
    save_file(tensors, hf / "model.safetensors")
    message = refused(hf, r"does not fit its configuration \(4 tensors\)")
    assert message.splitlines()[1:] == [
        "  missing multi_modal_projector.bias: [32] expected",
        "  unknown what.is.this: [2, 3]",
        "  misshaped language_model.model.norm.weight: [31] found, [32] expected",
        "  quantized language_model.lm_head.weight: torch.int8 found, a floating-point dtype expected",
    ]


def test_long_lists_are_cut(hf: Path) -> None:
    save_file({"one": torch.zeros(1)} | {f"t{i}": torch.zeros(1) for i in range(20)}, hf / "model.safetensors")
    message = refused(hf, "does not fit")
    assert len(message.splitlines()) == 22 and re.search(r"… and \d+ more", message)


def test_metas_problems(meta: Path) -> None:
    tensors = meta_tensors(meta)
    del tensors["text_model.norm.weight"]
    tensors["text_model.rope.freqs"] = torch.zeros(4)  # part of older files; needed by none
    tensors["text_model.layers.0.attention.wo.weight"] = torch.zeros(32, 16)
    torch.save(tensors, meta / "consolidated.00.pth")
    message = refused(meta, r"\(2 tensors\)")
    assert "missing text_model.norm.weight: [32] expected" in message
    assert "misshaped text_model.layers.0.attention.wo.weight: [32, 16] found, [32, 32] expected" in message


def test_a_missing_shard_is_named(sharded: Path) -> None:
    second = shards(sharded)[1]
    second.unlink()
    refused(sharded, f"lacks the shard {second.name}; download it again")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    shutil.copy(*shards(sharded)[1:3])
    refused(sharded, "is in both")


def test_shards_that_are_links_are_read(sharded: Path, tmp_path: Path) -> None:
    """The hub's cache is made of links."""
    blob = tmp_path / "blob"
    second = shards(sharded)[1]
    second.rename(blob)
    second.symlink_to("../blob")
    open_checkpoint(sharded)


TRICKS = ("../hf/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x.bin", 3, None, "a\\b.safetensors",
          "\0.safetensors", "x" * 300 + ".safetensors")  # fmt: skip


@pytest.mark.parametrize("name", TRICKS)
def test_path_tricks_in_the_index(sharded: Path, name: Any) -> None:
    edit_json(
        sharded / "model.safetensors.index.json",
        lambda raw: raw["weight_map"].update({"vision_model.class_embedding": name}),
    )
    refused(sharded, "no file of its own folder; refused")


@pytest.mark.parametrize("raw", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_map(sharded: Path, raw: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(raw)
    refused(sharded, "no weight_map")


@pytest.mark.parametrize("raw", ["", "[]", "{", "[" * 100_000, '{"a": NaN', "\xff", "1" * 5000])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_json_that_is_none(hf: Path, file: str, raw: str) -> None:
    (hf / file).write_text(raw, encoding="latin-1")
    refused(hf, file, ConfigError)


def header(entries: Any, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "seven bytes": (b"1234567", "too short"),
    "huge header": (struct.pack("<Q", 1 << 62) + b"{}", "not a safetensors file or is truncated"),
    "header past the end": (struct.pack("<Q", 100) + b"{}", "not a safetensors file or is truncated"),
    "not json": (struct.pack("<Q", 4) + b"\xff\x00ab", "damaged header"),
    "deep json": (struct.pack("<Q", 100_000) + b"[" * 100_000, "damaged header"),
    "a list": (header([]), "damaged header"),
    "no shape": (header({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "entry 'a' is damaged"),
    "shape of text": (header({"a": GOOD | {"shape": "2"}}, bytes(8)), "entry 'a' is damaged"),
    "negative": (header({"a": GOOD | {"shape": [-2]}}, bytes(8)), "entry 'a' is damaged"),
    "fraction": (header({"a": GOOD | {"shape": [2.0]}}, bytes(8)), "entry 'a' is damaged"),
    "bool": (header({"a": GOOD | {"shape": [True]}}, bytes(4)), "entry 'a' is damaged"),
    "three offsets": (header({"a": GOOD | {"data_offsets": [0, 4, 8]}}, bytes(8)), "entry 'a' is damaged"),
    "overflow": (header({"a": GOOD | {"shape": [1 << 61, 1 << 61, 16]}}, bytes(8)), "has 8 bytes for F32"),
    "unknown dtype": (header({"a": GOOD | {"dtype": "F99"}}, bytes(8)), "unknown dtype 'F99'"),
    "backwards": (header({"a": GOOD | {"data_offsets": [8, 0]}}, bytes(8)), "has -8 bytes"),
    "a hole": (header({"a": GOOD | {"data_offsets": [8, 16]}}, bytes(16)), "begins at 8, not at 0"),
    "overlap": (header({"a": GOOD, "b": GOOD}, bytes(8)), "begins at 0, not at 8"),
    "truncated": (header({"a": GOOD}, bytes(7)), "is truncated"),
    "too long": (header({"a": GOOD}, bytes(9)), "is damaged: .* bytes expected"),
    "a pickle": (pickle.dumps({"a": 1}), "is a pickle"),
    "old pickle": (pickle.dumps({"a": 1}, protocol=2), "is a pickle"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_safetensors(hf: Path, case: str) -> None:
    data, pattern = DAMAGED[case]
    (hf / "model.safetensors").write_bytes(data)
    refused(hf, pattern)


def test_a_torch_archive_named_safetensors(hf: Path) -> None:
    torch.save({"a": torch.zeros(2)}, hf / "model.safetensors")
    refused(hf, "is a pickle and not a safetensors file")


def test_not_a_regular_file(hf: Path) -> None:
    (hf / "model.safetensors").unlink()
    os.mkfifo(hf / "model.safetensors")  # opening one would wait for ever
    refused(hf, "not a file")


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch '{self.marker}'",))


def test_pickles_that_run_code_are_not_run(meta: Path, tmp_path: Path) -> None:
    marker = tmp_path / "evil-checkpoint-ran"
    torch.save({"a": Evil(marker)}, meta / "consolidated.00.pth")
    refused(meta, "cannot be loaded safely")
    (meta / "consolidated.00.pth").write_bytes(pickle.dumps({"a": Evil(marker)}))
    refused(meta, "not a torch archive")
    assert not marker.exists()


@pytest.mark.parametrize("value", [[1], {"a": 3}, {3: torch.zeros(1)}, {"a": torch.zeros(2).to_sparse()}])
def test_archives_of_something_else(meta: Path, value: Any) -> None:
    torch.save(value, meta / "consolidated.00.pth")
    refused(meta, "not a tensor|not a table|not a plain tensor")


def test_truncated_and_compressed_archives(meta: Path) -> None:
    path = meta / "consolidated.00.pth"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(meta, "not a torch archive or is truncated")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    refused(meta, "compressed or damaged archive")


def test_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "mllama_mp2", tmp_path / "mp2")
    first = folder / "consolidated.00.pth"
    state = torch.load(first, weights_only=True)
    torch.save({**state, "more": torch.zeros(1)}, first)
    refused(folder, "do not belong together: only one has 'more'")
    torch.save({**state, "text_model.norm.weight": torch.zeros(3)}, first)
    refused(folder, "do not belong together: 'text_model.norm.weight'")
    first.unlink()
    refused(folder, "shard consolidated.00.pth is missing")


def test_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "none", "there is no folder")
    refused(tmp_path, "holds no checkpoint; wanted config.json .*; it has nothing")
    (tmp_path / "pytorch_model.bin").touch()
    refused(tmp_path, "save it as safetensors first")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"dims": 32}, 'unknown key "dims"; did you mean "dim"'),
        ({"dim": 64}, "dim is 64, but the tensors have 32"),
        ({"n_layers": 4}, "n_layers is 4, but the tensors have 3"),
        ({"vocab_size": 65}, "vocab_size"),
        ({"vision_chunk_size": 42}, "vision_chunk_size is 42, but the tensors have 28"),
        ({"vision_max_num_chunks": 5}, "vision_max_num_chunks"),
        ({"vision_num_cross_attention_layers": 3}, "vision_num_cross_attention_layers"),
        ({"ffn_dim_multiplier": 3.0}, "give an FFN of"),
        ({"n_heads": 5}, "n_heads is 5"),
        ({"n_heads": "four"}, "n_heads must be a whole number"),
        ({"n_heads": 0}, "n_heads"),
        ({"n_kv_heads": 0}, "n_kv_heads"),
        ({"n_kv_heads": 3}, "divide"),
        ({"vision_model": 3}, "vision_model must be a table"),
        (
            {"vision_model": {"num_heads": 3}},
            'vision_model: unknown key "num_heads"; did you mean "num_attention_heads"',
        ),
        ({"vision_model": {"num_attention_heads": 2}}, "the projector reads 96 features of 3 layers, which does not"),
        ({"vision_model": {"intermediate_layers_indices": [0, 9]}}, r"once for each of \[0, 9\]"),
        ({"vision_model": {"intermediate_layers_indices": "all"}}, "must be a list of whole numbers"),
        ({"quantization_args": {"scheme": "int4"}}, "quantization_args is set"),
        ({"norm_eps": "small"}, "could not convert"),
        ({"multiple_of": 0}, "give an FFN of 0"),
    ],
)
def test_params_json(meta: Path, change: dict[str, Any], pattern: str) -> None:
    edit_json(meta / "params.json", lambda raw: raw.update(change))
    message = refused(meta, pattern, ConfigError)
    assert "params.json: " in message and "\n" not in message


def test_sizes_are_read_off_the_tensors(meta: Path) -> None:
    """Only what the tensors cannot show has to be stated."""
    path = meta / "params.json"
    needed = {"n_heads", "n_kv_heads", "rope_theta", "use_scaled_rope", "vision_model", "text_model"}
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key in needed}))
    assert open_checkpoint(meta).config == random_model().config


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("vision_config", {"max_num_tiles": 10**9}),
        ("vision_config", {"patch_size": 0}),
        ("vision_config", {"attention_heads": 0}),
        ("vision_config", {"num_hidden_layers": 10**9}),
        ("vision_config", {"hidden_size": 10**15}),
        ("vision_config", {"image_size": 10**9}),
        ("text_config", {"num_hidden_layers": 10**12}),
        ("text_config", {"cross_attention_layers": 3}),
        ("text_config", {"cross_attention_layers": ["a"]}),
        ("text_config", {"rope_scaling": "x"}),
        ("text_config", {"vocab_size": 10**18}),
        (None, {"image_token_index": "x"}),
        (None, {"image_token_index": 10**9}),
        (None, {"text_config": []}),
    ],
)
def test_absurd_configurations(hf: Path, section: str | None, change: dict[str, Any]) -> None:
    edit_json(hf / "config.json", lambda raw: (raw[section] if section else raw).update(change))
    with pytest.raises((ConfigError, CheckpointError)):
        open_checkpoint(hf)
