"""Small random models and checkpoints for the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llama_multimodal.config import ModelConfig, TextConfig, TiledVisionConfig
from llama_multimodal.models import VisionLanguageModel
from llama_multimodal.weights.mllama import meta_rules
from llama_multimodal.weights.rules import Held, TileGrid, same_bits

GOLDEN = Path(__file__).parent.parent / "golden"

CONFIG = ModelConfig(
    vision=TiledVisionConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_global_layers=2,
        num_attention_heads=2,
        image_size=28,
        intermediate_layers_indices=(0, 2),
    ),
    text=TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=(0, 3),  # where Meta's layout has them
        max_position_embeddings=64,
        rope_theta=10000.0,
        bos_token_id=60,
        eos_token_ids=(61, 62),
        pad_token_id=63,
    ),
    image_token_id=64,
)


@torch.no_grad()
def random_model(
    config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32, seed: int = 0
) -> VisionLanguageModel:
    """Every element random, so that two mixed up show; tile tables as Meta's layout can hold them."""
    generator = torch.Generator().manual_seed(seed)
    model = VisionLanguageModel(config)
    parameters = dict(model.named_parameters())
    for value in parameters.values():
        value.copy_(torch.randn(value.shape, generator=generator))
    for rule in meta_rules(config):
        if isinstance(rule, TileGrid):
            value = parameters[rule.ours]
            grid = torch.randn(rule.shapes(tuple(value.shape))[0], generator=generator)
            rule.read([Held(grid)], value.data)
    return model.to(dtype).eval()


def same_model(a: VisionLanguageModel, b: VisionLanguageModel) -> bool:
    """Whether two models have the same parameters, bit for bit."""
    x, y = dict(a.named_parameters()), dict(b.named_parameters())
    return x.keys() == y.keys() and all(same_bits(x[name].detach(), y[name].detach()) for name in x)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def hf_tensors(folder: Path) -> dict[str, Tensor]:
    """By the safetensors library, not by ours."""
    return {name: t for path in folder.glob("model*.safetensors") for name, t in load_file(path).items()}


def meta_tensors(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "consolidated.00.pth", weights_only=True)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
