"""The configurations of known checkpoints, against the table of their figures and against what is built of them."""

from __future__ import annotations

import pytest
import torch

from llama_multimodal.config import ModelConfig
from llama_multimodal.models import build_model
from llama_multimodal.planning.options import max_tiles
from llama_multimodal.planning.parameters import count_parameters
from llama_multimodal.zoo.configs import ASSEMBLED, CONFIGS, SIZES, find_config
from llama_multimodal.zoo.registry import checkpoints, find


def built(config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(config).parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_figures(name: str) -> None:
    known, config = find(name), CONFIGS[name]
    assert known is not None
    assert known.parameters == built(config) == count_parameters(config).total
    assert known.context == config.text.max_position_embeddings
    if isinstance(config, ModelConfig):
        assert (known.tile_size, known.max_tiles) == (config.vision.image_size, max_tiles(config))
    else:
        assert known.tile_size is None


def test_every_checkpoint_has_a_configuration() -> None:
    assert {checkpoint.name for checkpoint in checkpoints() if not checkpoint.embedded} == CONFIGS.keys()


def test_assembled_models_and_sizes() -> None:
    for config in ASSEMBLED.values():
        assert count_parameters(config).total == built(config)
    for size, name in SIZES.items():
        assert find_config(size) is find_config(size.lower()) is CONFIGS[name]
    assert find_config("siglip-llama-1b") is ASSEMBLED["siglip-llama-1b"]
    assert find_config("nobody/nothing") is None
