"""The parts of a model that a recipe can freeze, or give a learning rate of their own."""

from __future__ import annotations

from collections.abc import Iterable

from ...config import TextConfig, nearest
from ...errors import ConfigError
from ...models import LanguageModel

PARTS = ("vision", "projector", "self", "cross", "embedding", "lm_head")
"""The encoder; what maps its features; the decoder's self-attention and its gated blocks; its first table, and the last
with the norm before it. A head that is the embedding too belongs to `embedding`."""


def part_of(name: str, text: TextConfig) -> str:
    """The part of a parameter, by its name in the model."""
    words = name.split(".")
    if words[0] == "vision":
        return "vision"
    if words[0] != "decoder":
        return "projector"
    if words[1] == "layers":
        return "cross" if int(words[2]) in text.cross_attention_layers else "self"
    return "embedding" if words[1] == "embedding" else "lm_head"


def check_parts(named: Iterable[str], where: str) -> None:
    """Raises:
    ConfigError: a part that no model has.
    """
    for name in named:
        if name not in PARTS:
            raise ConfigError(f'{where}: there is no part "{name}"; known: {", ".join(PARTS)}{nearest(name, PARTS)}')


def freeze(model: LanguageModel, parts: Iterable[str]) -> None:
    """Let these parts learn nothing, and all others learn.

    Raises:
        ConfigError: no parameter is left that learns, or a table is frozen in one place and learns in the other.
    """
    frozen, text = set(parts), model.config.text
    if text.tie_word_embeddings and len(frozen & {"embedding", "lm_head"}) == 1:
        raise ConfigError("freeze: this model's LM head is its embedding; freeze both of them or neither")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name, text) not in frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("freeze: every part of this model is frozen; leave one out")
