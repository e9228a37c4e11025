"""Hugging Face ↔ Meta and back, bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints_for_tests import CONFIG, GOLDEN, hf_tensors, meta_tensors, random_model, same_model, same_tensors

from llama_multimodal import load
from llama_multimodal.errors import CheckpointError
from llama_multimodal.models import VisionLanguageModel
from llama_multimodal.weights import meta_pth
from llama_multimodal.weights.checkpoint import open_checkpoint
from llama_multimodal.weights.convert import convert
from llama_multimodal.weights.rules import same_bits
from llama_multimodal.weights.save import LEFTOVERS, save_checkpoint


def test_meta_to_hf_and_back(tmp_path: Path) -> None:
    """Meta's golden checkpoint is random everywhere, also in the tile cells that no aspect ratio uses."""
    source = GOLDEN / "mllama"
    convert(source, tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "meta", "meta")
    assert same_tensors(meta_tensors(source), meta_tensors(tmp_path / "meta"))
    assert json.loads((source / "params.json").read_text()) == json.loads(
        (tmp_path / "meta" / "params.json").read_text()
    )
    assert same_model(load(source)[0], load(tmp_path / "hf")[0])
    assert load(source)[0].config == load(tmp_path / "hf")[0].config


def test_hf_to_meta_and_back(tmp_path: Path) -> None:
    save_checkpoint(random_model(dtype=torch.bfloat16), tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", "meta")
    convert(tmp_path / "meta", tmp_path / "again", "hf")
    assert same_tensors(hf_tensors(tmp_path / "hf"), hf_tensors(tmp_path / "again"))
    assert (tmp_path / "hf" / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()
    assert not (tmp_path / "again" / LEFTOVERS).exists()


def test_model_parallel_shards_merge(tmp_path: Path) -> None:
    """Two shards of the reference's own making give the model that one file would."""
    source = GOLDEN / "mllama_mp2"
    convert(source, tmp_path / "hf", "hf")
    convert(source, tmp_path / "meta", "meta")
    convert(tmp_path / "hf", tmp_path / "meta2", "meta")
    merged = meta_tensors(tmp_path / "meta")
    assert same_tensors(merged, meta_tensors(tmp_path / "meta2"))
    assert same_model(load(source)[0], load(tmp_path / "meta")[0])
    shards = [torch.load(source / f"consolidated.{i:02d}.pth", weights_only=True) for i in range(2)]
    for name, value in merged.items():
        parts = [shard[name] for shard in shards]
        joined = [torch.cat(parts, dim=axis) for axis in range(parts[0].ndim)]
        assert any(same_bits(value, whole) for whole in (parts[0], *joined)), name


@pytest.mark.parametrize("name", ["mllama", "mllama_mp2"])
def test_where_the_system_does_not_tell_places_in_the_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then Meta's tensors are copied from the mapped file rather than read from it: the same model."""
    read = load(GOLDEN / name, dtype=torch.float16)[0]
    monkeypatch.setattr(meta_pth, "_mapped_at", lambda *_: None)
    assert same_model(read, load(GOLDEN / name, dtype=torch.float16)[0])


def test_rotary_rows_are_interleaved_in_metas_layout(tmp_path: Path) -> None:
    """Row by row, from the definition: pair i of a head is rows (2i, 2i + 1) there, rows (i, i + D/2) here."""
    model = random_model()
    save_checkpoint(model, tmp_path, "meta")
    theirs = meta_tensors(tmp_path)
    head_dim = CONFIG.text.head_dim
    for n, layer in enumerate(CONFIG.text.self_attention_layers):
        for name, heads in (("q", 4), ("k", 2)):
            ours = getattr(model.decoder.layers[layer].attention.qkv, f"{name}_proj").weight
            stored = theirs[f"text_model.layers.{n}.attention.w{name}.weight"]
            for head in range(heads):
                for i in range(head_dim // 2):
                    for half in range(2):
                        row, their_row = head * head_dim + i + half * head_dim // 2, head * head_dim + 2 * i + half
                        assert torch.equal(ours[row], stored[their_row])
    cross = model.decoder.layers[CONFIG.text.cross_attention_layers[1]].attention
    assert torch.equal(cross.q_proj.weight, theirs["text_model.cross_attention_layers.1.attention.wq.weight"])


def test_tile_grids_by_row_and_column(tmp_path: Path) -> None:
    model = random_model()
    save_checkpoint(model, tmp_path, "meta")
    encoder = "vision_model.vision_encoder"
    theirs = meta_tensors(tmp_path)
    for table, grid in (
        (model.vision.tile_position_embedding, theirs[f"{encoder}.gated_positional_embedding"]),
        (model.vision.pre_tile_embedding, theirs[f"{encoder}.pre_tile_pos_embed.embedding"].squeeze(2)),
        (model.vision.post_tile_embedding, theirs[f"{encoder}.post_tile_pos_embed.embedding"].squeeze(2)),
    ):
        for ratio_id, (rows, columns) in enumerate(CONFIG.vision.aspect_ratios, start=1):
            for r in range(rows):
                for c in range(columns):
                    assert torch.equal(table[ratio_id, r * columns + c], grid[r, c])
            assert not table[ratio_id, rows * columns :].any()
        assert not table[0].any()


@pytest.mark.parametrize("where", ["a ratio of its own", "an unused tile", "no image"])
@pytest.mark.parametrize("table", ["tile_position_embedding", "pre_tile_embedding", "post_tile_embedding"])
def test_a_fine_tune_that_meta_cannot_hold_is_refused(tmp_path: Path, where: str, table: str) -> None:
    model = random_model()
    index = {"a ratio of its own": (2, 1), "an unused tile": (1, 3), "no image": (0, 0)}[where]
    with torch.no_grad():
        getattr(model.vision, table)[index] += 1
    save_checkpoint(model, tmp_path / "hf")
    assert same_model(load(tmp_path / "hf")[0], model)
    with pytest.raises(CheckpointError, match=f"vision.{table} .*cannot store"):
        convert(tmp_path / "hf", tmp_path / "meta", "meta")
    assert not list((tmp_path / "meta").iterdir())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"cross_attention_layers": (1, 3)}, "cross-attention layers"),
        ({"num_extra_embeddings": 9}, None),
        ({"rope_scaling": None}, None),
    ],
)
def test_text_configurations(tmp_path: Path, change: dict[str, object], what: str | None) -> None:
    model = VisionLanguageModel(replace(CONFIG, text=replace(CONFIG.text, **change)))
    if what:
        with pytest.raises(CheckpointError, match=what):
            save_checkpoint(model, tmp_path, "meta")
    else:
        save_checkpoint(model, tmp_path, "meta")
        assert open_checkpoint(tmp_path).config == model.config


def test_names_of_transformers_five(tmp_path: Path) -> None:
    """A plain state dict of transformers 5 has other names; it loads, and converts to the released ones."""
    from safetensors.torch import save_file

    model = random_model()
    save_checkpoint(model, tmp_path / "released")
    tensors = hf_tensors(tmp_path / "released")
    (tmp_path / "internal").mkdir()
    shutil.copy(tmp_path / "released" / "config.json", tmp_path / "internal")

    def internal(name: str) -> str:
        if name == "language_model.lm_head.weight":
            return "lm_head.weight"
        return "model." + name.replace("language_model.model.", "language_model.")

    save_file({internal(name): value for name, value in tensors.items()}, tmp_path / "internal" / "model.safetensors")
    assert same_model(load(tmp_path / "internal")[0], model)
    convert(tmp_path / "internal", tmp_path / "again", "hf")
    assert same_tensors(hf_tensors(tmp_path / "again"), tensors)


def test_tokenizer_files_go_along(tmp_path: Path) -> None:
    save_checkpoint(random_model(), tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").write_text("ranks")
    (tmp_path / "hf" / "notes.txt").write_text("not ours")
    convert(tmp_path / "hf", tmp_path / "meta", "meta")
    assert (tmp_path / "meta" / "tokenizer.model").read_text() == "ranks"
    assert sorted(p.name for p in (tmp_path / "meta").iterdir()) == [
        "consolidated.00.pth", "params.json", "tokenizer.model",
    ]  # fmt: skip


def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    save_checkpoint(random_model(), tmp_path)
    with pytest.raises(CheckpointError, match="source itself"):
        convert(tmp_path, tmp_path, "meta")
    with pytest.raises(CheckpointError, match="unknown layout"):
        convert(tmp_path, tmp_path / "x", "gguf")  # type: ignore[arg-type]


def test_leftovers_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    convert(GOLDEN / "mllama", tmp_path / "a", "hf")
    convert(GOLDEN / "mllama_mp2", tmp_path / "b", "hf")
    shutil.copy(tmp_path / "a" / LEFTOVERS, tmp_path / "b" / LEFTOVERS)
    with pytest.raises(CheckpointError, match="another checkpoint"):
        convert(tmp_path / "b", tmp_path / "meta", "meta")
