"""The recipe of the embedded model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from ...config import ModelConfig, RopeScaling, TextConfig, TiledVisionConfig
from ...errors import ConfigError
from ...planning import MemoryPlan, PlanOptions, plan
from ..config import OptimConfig, Recipe
from ..parallel import Group
from ..task import Task


@dataclass(frozen=True)
class WorldOptim(OptimConfig):
    """Warm-up, a constant rate, and a linear decay to zero over the last `decay_steps`."""

    optimizer: Literal["adamw", "adamw8bit", "muon"] = "muon"
    learning_rate: float = 1e-3
    decoder_learning_rate: float | None = None  # once the decoder learns too; None: the same
    weight_decay: float = 0.05
    beta2: float = 0.98
    warmup_steps: int = 200
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    decay_steps: int = 1000
    ema_decay: float | None = 0.998


@dataclass(frozen=True)
class WorldData:
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


@dataclass(frozen=True, kw_only=True)
class WorldRecipe(Recipe):
    """One run of the embedded model's training, from nothing or from earlier weights."""

    TASK = "world"
    SECTIONS: ClassVar[Mapping[str, Any]] = {
        **Recipe.SECTIONS, "optim": WorldOptim, "data": WorldData, "vision": TiledVisionConfig, "text": TextConfig,
        "text.rope_scaling": RopeScaling,
    }  # fmt: skip

    vision: TiledVisionConfig
    text: TextConfig  # vocabulary and special tokens are filled in from the tokenizer
    optim: WorldOptim = WorldOptim()
    data: WorldData = WorldData()
    start_from: str | None = None  # "tiny" or a folder: a model of the same shape whose weights a new run starts from
    sheet_steps: int = 0  # first steps, of the vision encoder on sheets: small pictures full of things
    vision_steps: int = 0  # steps until here train the encoder alone, on its auxiliary targets
    auxiliary_weight: float = 1.0
    vocabulary_words: int = 740
    vocabulary_samples: int = 60_000  # conversations whose words are counted for the vocabulary
    threads: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {"samples_per_step": self.data.samples_per_step + self.data.sheets_beside + self.data.texts_beside}
        if self.sheet_steps:
            sizes["sheets_per_step"] = self.data.sheets_per_step
        for name, count in sizes.items():
            if count < self.processes:
                raise ConfigError(
                    f"data.{name}: a step has {count} and processes is {self.processes}; each process needs at least"
                    " one of every step: raise it, or run fewer processes"
                )

    def notes(self) -> list[str]:
        import torch

        from ..launch import num_processes
        from ..memory import check, describe

        processes = num_processes(self)
        made = self.memory_plan(processes)
        relief = "lower data.tokens_per_microbatch or data.samples_per_step"
        notes = [*describe(made, processes, "ddp"), *check(made, torch.device("cpu"), relief)]
        if (Path(self.output) / "tokenizer.json").exists():
            return notes
        return [*notes, "first the tokenizer is built, from the questions that will be asked; it takes about a minute"]

    def memory_plan(self, processes: int) -> MemoryPlan:
        """Of one process of the run: all that learns, on a step's samples with a picture of all tiles in each."""
        rows = -(-self.data.samples_per_step // processes)
        words = self.vocabulary_words  # the tokenizer's size, nearly
        options = PlanOptions(
            dtype="bf16" if self.dtype == "bfloat16" else "fp32",
            batch=rows,
            context=max(1, min(self.data.tokens_per_microbatch // rows, self.text.max_position_embeddings)),
            train="full",
            average=self.optim.ema_decay is not None,
            accumulate=True,
            device="cpu",
        )
        return plan(ModelConfig(self.vision, replace(self.text, vocab_size=words), words), options)

    def prepare(self) -> None:
        from .task import prepare

        prepare(self)  # the tokenizer is made once

    def task(self, group: Group) -> Task:
        from .task import WorldTask

        return WorldTask(self, group)
