"""Which rules hold for which kind of model, and what transformers calls its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

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


# --- names of modules -------------------------------------------------------------------------------------------------

_LLAVA_MODULES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head": "lm_head",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
_DINOV2_MODULES = {
    ".attention.attention.query": ".attention.q_proj",
    ".attention.attention.key": ".attention.k_proj",
    ".attention.attention.value": ".attention.v_proj",
    ".attention.output.dense": ".attention.o_proj",
}
"""Where transformers' modules are called otherwise than their tensors in a checkpoint."""


def hf_modules(config: AnyModelConfig, layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """What transformers calls our linear layers as modules, its present version's name first, then older ones.

    layers: our paths. For a model that transformers lacks these are the names
    """
    wanted = {f"{layer}.weight": layer for layer in layers}
    names: dict[str, list[str]] = {layer: [] for layer in wanted.values()}
    for rules in _generations(config, tuple(wanted)):
        for ours, theirs in rules:
            if ours in wanted:
                names[wanted[ours]].append(theirs.removesuffix(".weight"))
    return {layer: tuple(dict.fromkeys(found)) for layer, found in names.items()}


def _generations(config: AnyModelConfig, ours: Iterable[str]) -> Iterator[Iterator[tuple[str, str]]]:
    """Our parameters' names and theirs, the newest first; a tied LM head is a module all the same."""
    config = replace(config, text=replace(config.text, tie_word_embeddings=False))
    if isinstance(config, LanguageModelConfig) or config.model_type not in ("mllama", "llava", "llava_next"):
        yield _names(hf_rules(config, ours))
    elif config.model_type == "mllama":
        for prefixes in (mllama.HF_INTERNAL, mllama.HF_RELEASED):
            yield _names(mllama.hf_rules(config, prefixes))
    else:
        bare, wrapped = llava_rules(config, ("vision_tower.embeddings.",)), llava_rules(config, ())
        yield _names(bare, _LLAVA_MODULES | _DINOV2_MODULES)
        yield _names(wrapped, _LLAVA_MODULES)
        yield _names(wrapped)


def _names(rules: Iterable[Rule], replaced: Mapping[str, str] = MappingProxyType({})) -> Iterator[tuple[str, str]]:
    for rule in rules:
        name = rule.theirs[0]
        for old, new in replaced.items():
            if old in name:
                name = name.replace(old, new, 1)
        yield rule.ours, name
