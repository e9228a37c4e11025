"""Which rules hold for which kind of model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..config import AnyModelConfig, LanguageModelConfig, ModelConfig
from ..errors import CheckpointError
from . import mllama
from .llama import llama_rules
from .rules import Rename, Rule
from .splice import idefics3_rules, llava_rules


def hf_rules(config: AnyModelConfig, shapes: Iterable[str], keys: Iterable[str] = ()) -> list[Rule]:
    """Every parameter's place in Hugging Face's layout.

    shapes: the names of our parameters. keys: of the checkpoint, where there is one already
    """
    if isinstance(config, LanguageModelConfig):
        return llama_rules(config)
    return _RULES[config.model_type](config, shapes, keys)


_RULES: dict[str, Callable[[ModelConfig, Iterable[str], Iterable[str]], list[Rule]]] = {
    "mllama": lambda config, ours, keys: mllama.hf_rules(config, mllama.hf_names(keys)),
    "llava": lambda config, ours, keys: llava_rules(config, keys),
    "llava_next": lambda config, ours, keys: llava_rules(config, keys),
    "idefics3": lambda config, ours, keys: idefics3_rules(config),
    "smolvlm": lambda config, ours, keys: idefics3_rules(config),
    "llama_multimodal": lambda config, ours, keys: [Rename(name, (name,)) for name in ours],
}


def meta_rules(config: AnyModelConfig) -> list[Rule]:
    """Every parameter's place in Meta's layout.

    Raises:
        CheckpointError: it cannot hold this model.
    """
    if isinstance(config, LanguageModelConfig) or config.model_type != "mllama":
        raise CheckpointError("Meta's layout is read and written for Llama 3.2 Vision only; choose the layout hf")
    return mllama.meta_rules(config)
