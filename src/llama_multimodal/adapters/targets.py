"""Which layers of a model can carry an adapter, and which of them a preset or a glob means.

Paths are those of the plain model, whether its weights are packed or not: `decoder.layers.0.attention.qkv.q_proj`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from ..config import AnyModelConfig, nearest
from ..config.checks import path_matches
from ..errors import ConfigError
from ..models import LanguageModel
from ..models.layers import PackedLinear
from ..quant.nf4 import Nf4Linear
from .config import LoraConfig
from .layers import LoraLinear, LoraProjections

Number = TypeVar("Number", int, float)

PRESETS: dict[str, tuple[str, ...]] = {
    "self": ("self",),
    "cross": ("cross",),
    "mlp": ("mlp",),
    "vision": ("vision",),
    "projector": ("projector",),
    "all-linear": ("self", "cross", "mlp", "vision", "projector"),
}
"""The groups of layers that each stands for."""

_BY_NAME_ONLY = ("lm_head", "embedding")
"""Groups that a glob means only if it spells them out."""


@dataclass(frozen=True)
class Place:
    """One layer that can carry adapters. part: its name among several that are packed as one module at `module`."""

    path: str
    group: str
    shape: tuple[int, int]  # [N, K]
    module: str
    part: str | None = None
    reads_images: bool = False  # its input is an image's, not one vector a token of the text


def places(model: LanguageModel) -> dict[str, Place]:
    """Every layer that can carry an adapter, by its path."""
    return {place.path: place for path, module in _outermost(model) for place in _places_of(path, module, model.config)}


def resolve(model: LanguageModel, config: LoraConfig) -> dict[str, tuple[Place, int, float]]:
    """The layers that a configuration means, each with its rank and alpha, in the model's order.

    Raises:
        ConfigError: a preset, glob or override that means none of them.
    """
    known = places(model)
    chosen = {path for pattern in config.patterns for path in _matching(pattern, known)}
    ranks = _overrides(config.rank_pattern, chosen)
    alphas = _overrides(config.alpha_pattern, chosen)
    return {
        path: (place, ranks.get(path, config.rank), alphas.get(path, config.alpha))
        for path, place in known.items()
        if path in chosen
    }


def _matching(pattern: str, known: Mapping[str, Place]) -> list[str]:
    if pattern in PRESETS:
        found = [path for path, place in known.items() if place.group in PRESETS[pattern]]
        if not found:
            there = [name for name, groups in PRESETS.items() if any(p.group in groups for p in known.values())]
            raise ConfigError(f'this model has no layers for the target "{pattern}"; it has {", ".join(there)}')
        return found
    found = [
        path
        for path, place in known.items()
        if path_matches(path, pattern) and (place.group not in _BY_NAME_ONLY or place.group in pattern)
    ]
    if not found:
        names = {*PRESETS, *known, *(path.rpartition(".")[2] for path in known)}
        hint = nearest(pattern, names) or f"; presets are {', '.join(PRESETS)}"
        raise ConfigError(f'the target "{pattern}" means no layer of this model{hint}')
    return found


def _overrides(by_pattern: Mapping[str, Number], chosen: set[str]) -> dict[str, Number]:
    values: dict[str, Number] = {}
    for pattern, value in by_pattern.items():
        found = [path for path in chosen if path_matches(path, pattern)]
        if not found:
            raise ConfigError(f'"{pattern}" gives a rank or alpha for no target{nearest(pattern, chosen)}')
        for path in found:
            values.setdefault(path, value)
    return values


def _outermost(model: LanguageModel) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers, plain, packed or with adapters already."""
    within = "\0"
    for path, module in model.named_modules():
        if path.startswith(within) or path.endswith("patch_embedding") or path == "vision.head.in_proj":
            continue  # a convolution, and the parameter of an attention, in everybody else's code
        if isinstance(module, nn.Linear | PackedLinear | Nf4Linear | LoraLinear | LoraProjections):
            within = path + "."
            yield path, module


def _places_of(path: str, module: nn.Module, config: AnyModelConfig) -> Iterator[Place]:
    group = _group(path, config)
    keys = group == "cross" and path.endswith(("kv", "k_proj", "v_proj"))
    images = keys or group in ("vision", "projector", "unread")

    def place(shape: tuple[int, int], part: str | None = None) -> Place:
        return Place(path if part is None else f"{path}.{part}", group, shape, path, part, images)

    layer = module.base if isinstance(module, LoraLinear | LoraProjections) else module
    if isinstance(layer, PackedLinear) and layer.parts is not None:
        for part, rows in layer.parts.items():
            yield place((rows, layer.shape[1]), part)
    elif isinstance(layer, PackedLinear):
        yield place(layer.shape)
    else:
        assert isinstance(layer, nn.Linear | Nf4Linear)
        yield place((layer.out_features, layer.in_features))


def _group(path: str, config: AnyModelConfig) -> str:
    part, _, rest = path.partition(".")
    words = rest.split(".")
    if part == "vision":
        # SigLIP's pooling head is not read, nor what lies behind the hidden state that is.
        read = getattr(getattr(config, "vision", None), "num_blocks", None)
        behind = read is not None and words[0] == "layers" and int(words[1]) >= int(read)
        return "unread" if behind or words[0] == "head" else "vision"
    if part != "decoder" or words[0] != "layers":
        return part if part != "decoder" else words[0]
    if words[2] == "mlp":
        return "mlp"
    return "cross" if int(words[1]) in config.text.cross_attention_layers else "self"
