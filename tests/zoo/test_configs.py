"""The configurations of known checkpoints, against the table of their figures and against what is built of them."""

from __future__ import annotations

import pytest
import torch

import llama_multimodal as lmm
from llama_multimodal.config import ModelConfig
from llama_multimodal.models import build_model
from llama_multimodal.planning.options import max_tiles
from llama_multimodal.planning.parameters import count_parameters
from llama_multimodal.zoo.configs import ASSEMBLED, CONFIGS, PRESETS, find_config
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


def test_presets() -> None:
    for size, name in PRESETS.items():
        config = find_config(size)
        assert config is not None and config == find_config(size.lower()) == find_config(name)
        assert count_parameters(config).total == built(config)
        assert isinstance(config, ModelConfig) and config.fusion == "cross_attention"
    assert find_config("nobody/nothing") is None


@pytest.mark.parametrize("name", ASSEMBLED)
def test_assembled_models_are_what_from_parts_makes(name: str) -> None:
    _, text = ASSEMBLED[name]
    config = find_config(name)
    assert isinstance(config, ModelConfig)
    made, _ = lmm.from_parts(config.vision, CONFIGS[text].text, device="meta")
    assert made.config == config
