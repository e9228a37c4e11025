"""Every tensor of the full 11B and 90B checkpoints, by name and shape, in each layout and both ways.

`tests/golden/keys.json` comes from transformers and from Meta's reference (`make_keys.py`).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from llama_multimodal.config import LLAMA_3_2_11B_VISION, LLAMA_3_2_90B_VISION, ModelConfig
from llama_multimodal.weights.checkpoint import parameter_shapes
from llama_multimodal.weights.meta_params import config_from_meta, config_to_meta
from llama_multimodal.weights.mllama import HF_INTERNAL, HF_RELEASED, hf_names, hf_rules, meta_rules
from llama_multimodal.weights.rules import Rename, Rule

KEYS = json.loads((Path(__file__).parent.parent / "golden" / "keys.json").read_text())
CONFIGS = {"11b": LLAMA_3_2_11B_VISION, "90b": LLAMA_3_2_90B_VISION}
PARAMETERS = {"11b": 10_670_220_835, "90b": 88_593_355_323}


def golden(label: str) -> dict[str, tuple[int, ...]]:
    return {
        template.format(*numbers): tuple(entry["shape"])
        for template, entry in KEYS[label].items()
        for numbers in entry["numbers"]
    }


def rules_of(config: ModelConfig, layout: str) -> list[Rule]:
    if layout == "meta":
        return meta_rules(config)
    return hf_rules(config, HF_RELEASED if layout == "hf" else HF_INTERNAL)


@pytest.mark.parametrize("layout", ["hf", "hf internal", "meta"])
@pytest.mark.parametrize("size", ["11b", "90b"])
def test_every_key_and_shape(size: str, layout: str) -> None:
    wanted = golden(f"{size} {layout}")
    shapes = parameter_shapes(CONFIGS[size])
    rules = rules_of(CONFIGS[size], layout)
    # From theirs to ours: every parameter is filled once, from tensors that exist in these shapes.
    assert sorted(rule.ours for rule in rules) == sorted(shapes)
    stated = [(name, shape) for rule in rules for name, shape in zip(rule.theirs, rule.shapes(shapes[rule.ours]))]
    assert len(stated) == len(dict(stated))
    assert dict(stated) == wanted
    # And back: what a rule writes has these names and shapes too.
    for rule in rules:
        if isinstance(rule, Rename):
            written = rule.write(torch.empty(shapes[rule.ours], device="meta"))
            assert [tuple(t.shape) for t in written] == [wanted[name] for name in rule.theirs]
    if layout != "meta":
        assert hf_names(wanted) == (HF_RELEASED if layout == "hf" else HF_INTERNAL)


@pytest.mark.parametrize("size", ["11b", "90b"])
def test_the_sizes_add_up(size: str) -> None:
    assert sum(map(math.prod, parameter_shapes(CONFIGS[size]).values())) == PARAMETERS[size]


@pytest.mark.parametrize("size", ["11b", "90b"])
def test_meta_configuration_from_the_tensors(size: str) -> None:
    """Meta's own params.json of the released models, and the one that we write, with Meta's own tensor shapes."""
    shapes, text = golden(f"{size} meta"), CONFIGS[size].text
    released = {
        "dim": text.hidden_size, "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "n_heads": text.num_attention_heads,
        "n_kv_heads": 8, "n_layers": len(text.self_attention_layers), "norm_eps": 1e-05, "rope_theta": 500000.0,
        "use_scaled_rope": True, "vision_chunk_size": 560, "vision_max_num_chunks": 4, "vocab_size": 128256,
        "vision_num_cross_attention_layers": len(text.cross_attention_layers),
    }  # fmt: skip
    assert config_from_meta(released, shapes) == CONFIGS[size]
    assert config_to_meta(CONFIGS[size]) == released
