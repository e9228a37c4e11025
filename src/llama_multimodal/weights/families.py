"""Which rules hold for which kind of model."""

from __future__ import annotations

from collections.abc import Iterable

from ..config import AnyModelConfig, LanguageModelConfig
from ..errors import CheckpointError
from . import mllama
from .llama import llama_rules
from .rules import Rule


def hf_rules(config: AnyModelConfig, keys: Iterable[str] = ()) -> list[Rule]:
    """Every parameter's place in Hugging Face's layout; keys: of the checkpoint, where there is one already."""
    if isinstance(config, LanguageModelConfig):
        return llama_rules(config)
    return mllama.hf_rules(config, mllama.hf_names(keys))


def meta_rules(config: AnyModelConfig) -> list[Rule]:
    """Every parameter's place in Meta's layout.

    Raises:
        CheckpointError: it cannot hold this model.
    """
    if isinstance(config, LanguageModelConfig):
        raise CheckpointError("Meta's layout is read and written for Llama 3.2 Vision only; choose the layout hf")
    return mllama.meta_rules(config)
