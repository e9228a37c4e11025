"""Tiny vision encoders for the tests: checkpoints that transformers wrote, and such as this project wrote itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llama_multimodal.config import encoder_from_hf
from llama_multimodal.models import build_encoder
from llama_multimodal.weights.encoders import encoder_rules

_SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 16, "patch_size": 4}
_VIT = {**_SIZES, "intermediate_size": 40}
_NAFLEX = {**{key: value for key, value in _VIT.items() if key != "image_size"}, "num_patches": 16}
_TEXT = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # class of transformers without "Model", and its configuration
    "SigLIP": ("SiglipVision", _VIT),
    "SigLIP, whole": ("Siglip", {"vision_config": _VIT, "text_config": _TEXT}),
    "SigLIP, without a head": ("SiglipVision", {**_VIT, "vision_use_head": False}),
    "SigLIP, pixels left over": ("SiglipVision", {**_VIT, "image_size": 18}),  # as in so400m: 384 / 14
    "CLIP": ("CLIPVision", _VIT),
    "CLIP, whole": ("CLIP", {"vision_config": _VIT, "text_config": _TEXT, "projection_dim": 8}),
    "CLIP, exact GELU": ("CLIPVision", {**_VIT, "hidden_act": "gelu", "layer_norm_eps": 1e-3}),
    "DINOv2": ("Dinov2", _SIZES),
    "DINOv2, SwiGLU": ("Dinov2", {**_SIZES, "use_swiglu_ffn": True}),
    "DINOv2, no biases of q, k and v": ("Dinov2", {**_SIZES, "qkv_bias": False, "mlp_ratio": 2}),
    "DINOv2, registers": ("Dinov2WithRegisters", {**_SIZES, "num_register_tokens": 3}),
    "DINOv2, registers, SwiGLU": (
        "Dinov2WithRegisters",
        {**_SIZES, "hidden_size": 20, "num_attention_heads": 2, "use_swiglu_ffn": True},  # width rounded up to 56
    ),
}
NAFLEX: dict[str, tuple[str, dict[str, Any]]] = {
    "SigLIP 2": ("Siglip2Vision", _NAFLEX),
    "SigLIP 2, whole": ("Siglip2", {"vision_config": _NAFLEX, "text_config": _TEXT}),
}


def peer(kind: str, folder: Path | None = None) -> Any:
    """transformers' vision model of a kind with every parameter random; written to `folder`, whole where it is."""
    transformers = pytest.importorskip("transformers")
    name, config = (KINDS | NAFLEX)[kind]
    whole = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in whole.named_parameters():
            scales = ("norm" in key and key.endswith("weight")) or "lambda" in key
            value.copy_(scales + 0.25 * torch.randn(value.shape, generator=generator))
    if folder is not None:
        whole.save_pretrained(folder)
    return getattr(whole, "vision_model", whole)


def pixels(height: int, width: int, images: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(images, 3, height, width, generator=torch.Generator().manual_seed(seed))


RAW: dict[str, dict[str, Any]] = {  # config.json of encoders that need no transformers
    "siglip": {"model_type": "siglip_vision_model", **_VIT},
    "clip": {"model_type": "clip_vision_model", **_VIT},
    "dinov2": {"model_type": "dinov2_with_registers", **_SIZES, "num_register_tokens": 2},
}


@torch.no_grad()
def write(raw: dict[str, Any], folder: Path, prefix: str = "", **extra: Tensor) -> dict[str, Tensor]:
    """A random checkpoint for a config.json in `folder`; prefix: of the names. extra: more tensors, by whole name."""
    config = encoder_from_hf(raw)
    torch.manual_seed(0)
    parameters = dict(build_encoder(config).named_parameters())
    tensors = {
        name: torch.randn(view.shape)
        for rule in encoder_rules(config, prefix)
        for name, view in zip(rule.theirs, rule.write(parameters[rule.ours]), strict=True)
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file({**tensors, **extra}, folder / "model.safetensors")
    return tensors
