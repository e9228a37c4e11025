"""The parts that a model can be made of, by name: vision encoders and projectors. Others may add theirs.

A part's name is what `config.json` of an assembled model calls it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from ..errors import ConfigError
from .checks import from_dict, nearest
from .encoders import ClipVisionConfig, Dinov2Config, SiglipConfig
from .preprocess import Preprocess
from .projectors import IdentityProjector, LinearProjector, MLPProjector, PixelShuffleProjector, ProjectorConfig
from .vision import TiledVisionConfig


class VisionConfig(Protocol):
    """What a vision encoder's configuration has, besides being a frozen dataclass."""

    @property
    def output_size(self) -> int:
        """Width of the features."""

    @property
    def image_size(self) -> int:
        """Side of the images that it usually takes, pixels."""

    def num_tokens(self, height: int, width: int) -> int:
        """Tokens that an image of this size becomes.

        Raises:
            ImageError: it does not take such images.
        """

    def preprocess(self) -> Preprocess:
        """How a picture becomes its pixels, where a checkpoint has no `preprocessor_config.json`."""


VISION: dict[str, type[Any]] = {
    "tiled": TiledVisionConfig,
    "siglip": SiglipConfig,
    "clip": ClipVisionConfig,
    "dinov2": Dinov2Config,
}
PROJECTORS: dict[str, type[Any]] = {
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "pixel_shuffle": PixelShuffleProjector,
    "identity": IdentityProjector,
}


def add_part(kinds: dict[str, type[Any]], name: str, config: type[Any]) -> None:
    """Make a configuration known by a name.

    Raises:
        ConfigError: the name is another's, or the class is no frozen dataclass.
    """
    if kinds.get(name, config) is not config:
        raise ConfigError(f'the name "{name}" is taken by {kinds[name].__name__}; choose another')
    if not dataclasses.is_dataclass(config) or not config.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ConfigError(f"{config.__name__} must be a frozen dataclass (@dataclass(frozen=True))")
    kinds[name] = config


def part_from_dict(kinds: Mapping[str, type[Any]], raw: Mapping[str, Any], where: str) -> Any:
    """A part's configuration from a table with its `type` and its fields.

    Raises:
        ConfigError: an unknown type, key or value.
    """
    kind = str(raw.get("type"))
    if kind not in kinds:
        hint = nearest(kind, kinds)
        mend = "; a part of your own wants register_encoder or register_projector before this"
        raise ConfigError(f'{where}: type "{kind}" is not known; known: {", ".join(kinds)}{hint}{mend}')
    return from_dict(kinds[kind], {key: value for key, value in raw.items() if key != "type"}, where)


def part_to_dict(kinds: Mapping[str, type[Any]], config: Any) -> dict[str, Any]:
    """The table of `part_from_dict`."""
    name = next(name for name, kind in kinds.items() if type(config) is kind)
    return {"type": name, **dataclasses.asdict(config)}


__all__ = [
    "PROJECTORS",
    "VISION",
    "ProjectorConfig",
    "VisionConfig",
    "add_part",
    "part_from_dict",
    "part_to_dict",
]
