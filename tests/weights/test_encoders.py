"""Files of vision encoders: every tensor in its place, whole models and their parts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_encoders import KINDS, NAFLEX, RAW, peer, pixels, write
from torch import Tensor

from llama_multimodal.config import (
    ClipVisionConfig,
    Dinov2Config,
    SiglipConfig,
    clip_from_hf,
    dinov2_from_hf,
    encoder_from_hf,
    siglip_from_hf,
)
from llama_multimodal.errors import CheckpointError, ConfigError
from llama_multimodal.models import build_encoder
from llama_multimodal.weights.encoders import encoder_rules
from llama_multimodal.weights.load_encoder import load_encoder
from llama_multimodal.weights.rules import same_bits


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Put tensors into a checkpoint, or take them out where they are None; `__` in a name stands for a dot."""
    path = folder / "model.safetensors"
    held = load_file(path) | {name.replace("__", "."): value for name, value in tensors.items()}
    save_file({name: value for name, value in held.items() if value is not None}, path)


def same_encoder(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    x, y = dict(a.named_parameters()), dict(b.named_parameters())
    return x.keys() == y.keys() and all(same_bits(x[name].detach(), y[name].detach()) for name in x)


# --- where tensors lie -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS | NAFLEX)
def test_what_is_read_can_be_written_again(kind: str, tmp_path: Path) -> None:
    """Every tensor that transformers wrote for the encoder comes out of ours, bit for bit, but for DINOv2's mask."""
    peer(kind, tmp_path)
    encoder = load_encoder(tmp_path)
    parameters = dict(encoder.named_parameters())
    prefix = "vision_model." if "whole" in kind else ""
    rules = encoder_rules(encoder.config, prefix)
    assert sorted(rule.ours for rule in rules) == sorted(parameters)
    written = {
        name: tensor.contiguous()
        for rule in rules
        for name, tensor in zip(rule.theirs, rule.write(parameters[rule.ours].detach()), strict=True)
    }
    stored = load_file(tmp_path / "model.safetensors")
    theirs = {name: t for name, t in stored.items() if name.startswith(prefix) and "mask_token" not in name}
    assert written.keys() == theirs.keys() and all(same_bits(written[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        ("siglip", "vision_model."),  # as transformers 4 wrote the vision part alone
        ("clip", "vision_model."),
        ("dinov2", "dinov2_with_registers."),  # with a classifier
    ],
)
def test_a_prefix_changes_nothing(kind: str, prefix: str, tmp_path: Path) -> None:
    write(RAW[kind], tmp_path / "plain")
    write(RAW[kind], tmp_path / "prefixed", prefix)
    plain, prefixed = load_encoder(tmp_path / "plain"), load_encoder(tmp_path / "prefixed")
    assert same_encoder(plain, prefixed) and not plain.training


def test_names_within_a_larger_model() -> None:
    (first, *_) = encoder_rules(SiglipConfig(), "model.vision_tower.", "vision.")
    assert first.ours == "vision.patch_embedding.bias"
    assert first.theirs == ("model.vision_tower.embeddings.patch_embedding.bias",)


def test_tensors_beside_the_encoder(tmp_path: Path) -> None:
    extra = {
        "vision_model.embeddings.position_ids": torch.arange(17)[None],  # as older files have it
        "text_model.embeddings.token_embedding.weight": torch.randn(4, 4),
        "text_projection.weight": torch.randn(4, 4),
        "visual_projection.weight": torch.randn(4, 4),
        "logit_scale": torch.tensor(1.0),
    }
    write(RAW["clip"], tmp_path / "alone")
    write(RAW["clip"], tmp_path / "whole", "vision_model.", **extra)
    assert same_encoder(load_encoder(tmp_path / "alone"), load_encoder(tmp_path / "whole"))


def test_the_pooling_head_is_there_if_the_files_have_one(tmp_path: Path) -> None:
    tensors = write(RAW["siglip"], tmp_path)
    assert load_encoder(tmp_path).head is not None
    head = {name: None for name in tensors if name.startswith("head.")}
    assert len(head) == 11
    change(tmp_path, **head)
    assert load_encoder(tmp_path).head is None
    change(tmp_path, **{"head.probe": tensors["head.probe"]})
    with pytest.raises(CheckpointError, match=r"missing head.attention.in_proj_weight: \[72, 24\] expected"):
        load_encoder(tmp_path)


def test_shards_dtypes_and_the_meta_device(tmp_path: Path) -> None:
    tensors = write(RAW["dinov2"], tmp_path)
    whole = load_encoder(tmp_path)
    rounded = load_encoder(tmp_path, torch.bfloat16)
    assert {value.dtype for value in rounded.parameters()} == {torch.bfloat16}
    assert same_encoder(rounded, whole.to(torch.bfloat16))
    assert {value.device.type for value in load_encoder(tmp_path, device="meta").parameters()} == {"meta"}
    parts = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same_encoder(rounded, load_encoder(tmp_path, torch.bfloat16))


# --- files that are refused ------------------------------------------------------------------------------------------


def test_all_problems_in_one_error(tmp_path: Path) -> None:
    write(RAW["clip"], tmp_path)
    change(
        tmp_path,
        embeddings__class_embedding=None,
        pre_layrnorm__weight=torch.randn(23),
        post_layernorm__bias=torch.zeros(24, dtype=torch.int8),
        encoder__layers__3__mlp__fc1__bias=torch.randn(40),
    )
    with pytest.raises(CheckpointError) as caught:
        load_encoder(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("does not fit its configuration (4 tensors):")
    assert sorted(line.strip() for line in lines[1:]) == [
        "misshaped pre_layrnorm.weight: [23] found, [24] expected",
        "missing embeddings.class_embedding: [24] expected",
        "quantized post_layernorm.bias: torch.int8 found, a floating-point dtype expected",
        "unknown encoder.layers.3.mlp.fc1.bias: [40]",
    ]


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json is not a file"):
        load_encoder(tmp_path)
    write(RAW["siglip"], tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**RAW["siglip"], "num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match="asks for 1000000000 layers, but there are only"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**RAW["siglip"], "intermediate_size": 10**18}))
    with pytest.raises(ConfigError, match="cannot be built"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(RAW["siglip"]))
    with pytest.raises(ConfigError, match=r"config.json: SiglipConfig: layer must lie between -4 and 3, not 9"):
        load_encoder(tmp_path, layer=9)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing"):
        load_encoder(tmp_path)


# --- config.json -----------------------------------------------------------------------------------------------------

RELEASED: dict[str, tuple[dict[str, Any], Any]] = {  # what the hub's files say, and what that is
    "google/siglip-so400m-patch14-384": (
        {
            "architectures": ["SiglipModel"], "initializer_factor": 1.0, "model_type": "siglip",
            "text_config": {"hidden_size": 1152, "model_type": "siglip_text_model"}, "torch_dtype": "float32",
            "vision_config": {
                "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model",
                "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
            },
        },
        SiglipConfig(1152, 27, 16, image_size=384, patch_size=14, intermediate_size=4304),
    ),
    "google/siglip2-so400m-patch16-naflex": (
        {
            "model_type": "siglip2", "text_config": {},
            "vision_config": {
                "hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip2_vision_model",
                "num_attention_heads": 16, "num_hidden_layers": 27,
            },
        },
        SiglipConfig(
            1152, 27, 16, image_size=256, intermediate_size=4304, channels_last=True, position_mode="bilinear",
            position_antialias=True,
        ),
    ),
    "openai/clip-vit-large-patch14-336": (
        {
            "model_type": "clip", "logit_scale_init_value": 2.6592, "projection_dim": 768, "text_config": {},
            "text_config_dict": {}, "vision_config": {"model_type": "clip_vision_model", "dropout": 0.0},
            "vision_config_dict": {
                "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16,
                "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
            },
        },
        ClipVisionConfig(1024, 24, 16, image_size=336, patch_size=14, intermediate_size=4096),
    ),
    "openai/clip-vit-base-patch32": ({"model_type": "clip_vision_model"}, ClipVisionConfig()),
    "facebook/dinov2-giant": (
        {
            "model_type": "dinov2", "hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24,
            "image_size": 518, "mlp_ratio": 4, "use_swiglu_ffn": True, "layerscale_value": 1.0, "drop_path_rate": 0.0,
            "stage_names": ["stem", "stage1"], "out_features": ["stage40"], "out_indices": [40], "qkv_bias": True,
            "apply_layernorm": True, "reshape_hidden_states": True, "use_mask_token": True, "hidden_act": "gelu",
        },
        Dinov2Config(1536, 40, 24, image_size=518, swiglu=True),
    ),
    "facebook/dinov2-with-registers-small": (
        {
            "model_type": "dinov2_with_registers", "hidden_size": 384, "num_attention_heads": 6,
            "image_size": [518, 518], "patch_size": 14, "num_register_tokens": 4,
        },
        Dinov2Config(384, 12, 6, image_size=518, num_register_tokens=4, position_antialias=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_what_configurations_become(name: str) -> None:
    raw, expected = RELEASED[name]
    assert encoder_from_hf(raw) == expected


@pytest.mark.parametrize(
    "model_type",
    ["siglip_vision_model", "siglip2_vision_model", "clip_vision_model", "dinov2", "dinov2_with_registers"],
)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    """A file may leave out whatever transformers has a default for."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(model_type)
    assert encoder_from_hf({"model_type": model_type}) == encoder_from_hf(theirs.to_dict())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "vit"}, 'model_type "vit" is no encoder; supported: siglip, siglip_vision_model, siglip2, '),
        ({"model_type": "dinov3"}, r'dinov2_with_registers; did you mean "dinov2"\?'),
        ({}, 'model_type "None" is no encoder'),
        ({"model_type": "clip_vision_model", "hiden_size": 3}, r'unknown key "hiden_size"; did you mean "hidden_size"'),
        ({"model_type": "dinov2", "num_register_tokens": 4}, 'unknown key "num_register_tokens"'),
        ({"model_type": "siglip_vision_model", "num_patches": 256}, 'unknown key "num_patches"'),
        ({"model_type": "siglip", "vision_config": {}, "visoin_config": {}}, 'did you mean "vision_config"'),
        ({"model_type": "siglip"}, "vision_config is missing or not a table"),
        ({"model_type": "siglip", "vision_config": {"model_type": "clip_vision_model"}}, "needs 'siglip_vision_model'"),
        ({"model_type": "siglip_vision_model", "hidden_act": "silu"}, '"silu" is not implemented; supported: gelu'),
        ({"model_type": "siglip_vision_model", "image_size": [224, 196]}, r"image_size is \[224, 196\]; only squares"),
        ({"model_type": "siglip_vision_model", "hidden_size": "768"}, "hidden_size must be a number"),
        ({"model_type": "siglip2_vision_model", "num_patches": 250}, "num_patches must be a square, not 250"),
        ({"model_type": "dinov2", "qkv_bias": "no"}, "qkv_bias must be true or false, not 'no'"),
        ({"model_type": "dinov2", "head_dim": 32}, "head_dim is 32; this model needs 64"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder_from_hf(raw)


def test_each_reader_reads_its_own() -> None:
    for reader, kind in ((siglip_from_hf, "siglip"), (clip_from_hf, "clip"), (dinov2_from_hf, "dinov2")):
        assert reader(RAW[kind]) == encoder_from_hf(RAW[kind])
    with pytest.raises(ConfigError, match='model_type is "dinov2"; clip, clip_vision_model was expected'):
        clip_from_hf({"model_type": "dinov2"})


@torch.inference_mode()
def test_an_encoder_of_our_own_is_read_back(tmp_path: Path) -> None:
    """Without transformers: features of what was written and of what is read agree to the bit."""
    for kind, raw in RAW.items():
        tensors = write(raw, tmp_path / kind)
        encoder, model = load_encoder(tmp_path / kind), build_encoder(encoder_from_hf(raw))
        parameters = dict(model.named_parameters())
        for rule in encoder_rules(model.config):
            for name, view in zip(rule.theirs, rule.write(parameters[rule.ours]), strict=True):
                view.copy_(tensors[name])
        assert torch.equal(model(pixels(16, 16)), encoder(pixels(16, 16)))
