"""A training recipe: a YAML file read into frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import RopeScaling, TextConfig, TiledVisionConfig, from_dict
from ..errors import ConfigError, MissingExtraError


@dataclass(frozen=True)
class OptimConfig:
    """Warm-up, a constant rate, and a linear decay to zero over the last `decay_steps`.

    Muon updates the blocks' matrices, at the step size AdamW would have; AdamW everything else.
    """

    learning_rate: float = 1e-3
    decoder_learning_rate: float | None = None  # once the decoder learns too; None: the same
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.98
    warmup_steps: int = 200
    decay_steps: int = 1000
    clip_norm: float = 1.0
    ema_decay: float = 0.998  # the averaged weights are what is evaluated and kept


@dataclass(frozen=True)
class DataConfig:
    """What is rendered for a step. Sample i of step s is a pure function of (seed, s, i)."""

    seed: int = 0
    samples_per_step: int = 16
    turns_per_scene: int = 8
    sheets_per_step: int = 96  # in the steps that are taken on sheets alone
    sheets_beside: int = 0  # sheets that a later step has besides its samples
    texts_beside: int = 0  # printed texts, likewise
    small_pictures: float = 0.0  # share that is made to fit one or two tiles of 128 pixels, beyond those that do
    tokens_per_microbatch: int = 2048  # padded text tokens; longer steps run in several pieces
    workers: int = 1


@dataclass(frozen=True)
class Recipe:
    """One training run."""

    output: str
    steps: int
    vision: TiledVisionConfig
    text: TextConfig  # vocabulary and special tokens are filled in from the tokenizer
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    start_from: str | None = None  # "tiny" or a folder: a model of the same shape whose weights a new run starts from
    sheet_steps: int = 0  # first steps, of the vision encoder on sheets: small pictures full of things
    vision_steps: int = 0  # steps until here train the encoder alone, on its auxiliary targets
    auxiliary_weight: float = 1.0
    # Of the products; weights and sums stay in float32. A CPU without bf16 arithmetic, which would emulate it at a
    # tenth of its speed, multiplies in float32 either way.
    dtype: Literal["float32", "bfloat16"] = "float32"
    vocabulary_words: int = 740
    vocabulary_samples: int = 60_000  # conversations whose words are counted for the vocabulary
    seed: int = 0
    processes: int = 1  # data-parallel: each takes its share of every step's samples
    threads: int = 1  # of each process
    save_every: int = 100

    def __post_init__(self) -> None:
        sizes = {"samples_per_step": self.data.samples_per_step + self.data.sheets_beside + self.data.texts_beside}
        if self.sheet_steps:
            sizes["sheets_per_step"] = self.data.sheets_per_step
        for name, count in sizes.items():
            if count < self.processes:
                raise ConfigError(
                    f"data.{name}: a step has {count} and processes is {self.processes}; each process needs at least"
                    " one of every step: raise it, or run fewer processes"
                )


def read_recipe(path: str | Path) -> Recipe:
    """Raises:
    ConfigError: no such file, not YAML, an unknown or missing key, or a value of the wrong type.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("train", "reading a recipe") from error
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path} must be a table of settings, not {type(raw).__name__}")
    return recipe_from_dict(raw, str(path))


def recipe_from_dict(raw: Mapping[str, Any], where: str) -> Recipe:
    for key in ("output", "steps", "vision", "text"):
        if key not in raw:
            raise ConfigError(f'{where}: "{key}" is missing')
    sections = {"vision": TiledVisionConfig, "text": TextConfig, "optim": OptimConfig, "data": DataConfig}
    given = dict(raw)
    for key, cls in sections.items():
        if key in given:
            if not isinstance(given[key], Mapping):
                raise ConfigError(f"{where}: {key} must be a table")
            section = dict(given[key])
            if isinstance(section.get("rope_scaling"), Mapping):
                section["rope_scaling"] = from_dict(RopeScaling, section["rope_scaling"], f"{where}: rope_scaling")
            given[key] = from_dict(cls, section, f"{where}: {key}")
    return from_dict(Recipe, given, where)
