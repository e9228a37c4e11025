"""Where the parameters of LLaVA, Idefics3 and SmolVLM lie in Hugging Face's checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..config import Dinov2Config, ModelConfig
from .encoders import encoder_rules
from .llama import decoder_rules
from .rules import Rename, Rule, renames

_LLAVA_TOWER = "vision_tower."
_WRAPPED = "vision_model."
"""What the names within a SigLIP or CLIP tower begin with in the released files; transformers 5 writes them without."""


def llava_rules(config: ModelConfig, keys: Iterable[str]) -> list[Rule]:
    """LLaVA 1.5 and NeXT; keys: of the checkpoint, where there is one already."""
    vision: Any = config.vision
    bare = any(key.startswith(f"{_LLAVA_TOWER}embeddings.") for key in keys) or isinstance(vision, Dinov2Config)
    rules = encoder_rules(vision, _LLAVA_TOWER if bare else _LLAVA_TOWER + _WRAPPED, "vision.")
    rules += _projector(config, "multi_modal_projector", {"fc1": "linear_1", "fc2": "linear_2"})
    if config.grid_pinpoints:
        rules.append(Rename("image_newline", ("image_newline",)))
    return [*rules, *decoder_rules(config.text, "language_model.model", "language_model.lm_head")]


def idefics3_rules(config: ModelConfig) -> list[Rule]:
    """Idefics3 and SmolVLM."""
    vision: Any = config.vision
    rules = encoder_rules(vision, "model.vision_model.", "vision.")
    rules += _projector(config, "model.connector.modality_projection", {"proj": "proj"})
    return [*rules, *decoder_rules(config.text, "model.text_model", "lm_head")]


def _projector(config: ModelConfig, theirs: str, layers: dict[str, str]) -> Iterator[Rule]:
    parts = ("weight", "bias") if getattr(config.projector, "bias", False) else ("weight",)
    yield from renames("projector", theirs, {f"{a}.{x}": f"{b}.{x}" for a, b in layers.items() for x in parts})
