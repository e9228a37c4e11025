"""The recipe of a fine-tuning run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from ...adapters.config import LoraConfig
from ...errors import ConfigError
from ..config import ParallelOptions, Recipe
from ..parallel import Group
from ..task import Task
from .config import ChatData, chat_data_from_dict
from .parts import check_parts

RELIEF = (
    "lower batch.tokens or data.max_length, set recompute: true, take the method qlora, or share the model among more"
    " processes (parallel.method: fsdp)"
)
"""What makes a step smaller."""


@dataclass(frozen=True)
class BatchConfig:
    """How a step's rows are put together. Whatever is chosen, a step's loss is the mean over all its learnt tokens."""

    rows: int = 16  # conversations of a step, over all processes
    tokens: int = 4096  # padded tokens that a micro-batch has at most, unless one row alone is longer
    rows_at_once: int | None = None  # rows that a micro-batch has at most
    packing: bool = False  # several conversations in one row, each reading itself only

    def __post_init__(self) -> None:
        if min(self.rows, self.tokens, 1 if self.rows_at_once is None else self.rows_at_once) < 1:
            raise ConfigError("batch: rows, tokens and rows_at_once must be at least 1")


@dataclass(frozen=True)
class EvaluateConfig:
    """Questions about held-out rows while training goes on: their loss, and what the model answers."""

    every: int = 0  # steps; 0 never asks
    rows: int = 64  # whose loss is taken
    answers: int = 16  # of them that are answered too, for exact match and ANLS
    max_new_tokens: int = 64


@dataclass(frozen=True)
class DistillationConfig:
    """How strongly sources with `distill` are held to the base's predictions (Hinton et al. 2015; as a guard against
    forgetting, Li and Hoiem 2016): `weight` times the mean over tokens of T² · KL(base ‖ adapted), at temperature T."""

    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if min(self.weight, self.temperature) <= 0:
            raise ConfigError("distillation: weight and temperature must be above 0")


@dataclass(frozen=True, kw_only=True)
class ChatRecipe(Recipe):
    """A base model, conversations, and what is trained: an adapter (LoRA), one over 4-bit weights (QLoRA), or all."""

    TASK = "chat"
    SECTIONS: ClassVar[Mapping[str, Any]] = {
        **Recipe.SECTIONS, "data": chat_data_from_dict, "batch": BatchConfig, "evaluate": EvaluateConfig,
        "lora": LoraConfig, "parallel": ParallelOptions, "distillation": DistillationConfig,
    }  # fmt: skip

    model: str  # "tiny", a folder or a repository of the Hugging Face hub
    data: ChatData
    method: Literal["lora", "qlora", "full"] = "lora"
    lora: LoraConfig = field(default_factory=LoraConfig)
    freeze: tuple[str, ...] = ()  # parts that `full` leaves alone: vision, projector, self, cross, embedding, lm_head
    distillation: DistillationConfig = DistillationConfig()
    batch: BatchConfig = BatchConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    device: str = "auto"  # a GPU where there is one
    recompute: bool = False  # gradient checkpointing: less memory, a third more arithmetic
    parallel: ParallelOptions = field(default_factory=ParallelOptions)  # how processes share the model

    def __post_init__(self) -> None:
        super().__post_init__()
        check_parts(self.freeze, "freeze")
        check_parts(self.optim.learning_rates, "optim.learning_rates")
        if self.freeze and self.method != "full":
            raise ConfigError(f"freeze is for the method full; {self.method} trains what lora.targets names")
        if self.dtype == "float16" and self.method != "full" and self.lora.dtype != "float32":
            raise ConfigError("dtype float16 scales gradients, which need lora.dtype float32")
        if self.evaluate.every and not (self.data.evaluation or self.data.holdout):
            raise ConfigError("evaluate.every needs rows to evaluate on: set data.holdout, or list data.evaluation")
        if self.result == "best" and not self.evaluate.every:
            raise ConfigError("result: best needs evaluate.every, which says what is best")
        self._check_distillation()
        if self.parallel.cuts:
            self._check_cuts()

    def _check_distillation(self) -> None:
        distills = any(source.distill for source in self.data.sources)
        if distills and self.method == "full":
            raise ConfigError(
                "data: distill holds an adapter to what its base says, and the method full changes the base itself;"
                " take lora, or learn those rows' answers"
            )
        if self.distillation != DistillationConfig() and not distills:
            raise ConfigError("distillation is for sources with distill: true, and data has none")

    def _check_cuts(self) -> None:
        how = "fsdp" if self.parallel.method == "fsdp" else "tensor_parallel"
        if self.method == "qlora":
            raise ConfigError(f"parallel: {how} does not cut the 4-bit weights of qlora; take the method lora, or ddp")
        if self.optim.optimizer != "adamw":
            raise ConfigError(
                f"parallel: the optimizer {self.optim.optimizer} needs whole weights, and {how} cuts them; take adamw"
            )
        if self.dtype == "float16":
            raise ConfigError(f"parallel: {how} has no scaled loss, which float16 needs; take bfloat16")
        if self.parallel.tensor_parallel > 1 and self.lora.dora:
            raise ConfigError("parallel: tensor_parallel does not cut what dora learns; leave one of them out")

    @property
    def adapts(self) -> bool:
        return self.method != "full"

    @property
    def sharing(self) -> ParallelOptions:
        return self.parallel

    @property
    def device_type(self) -> str:
        import torch

        cuda = torch.cuda.is_available() if self.device == "auto" else self.device.startswith("cuda")
        return "cuda" if cuda else "cpu"

    def notes(self) -> list[str]:
        from ..launch import num_processes
        from ..memory import check, describe
        from .memory import config_of, memory_plan
        from .model import device_of

        processes = num_processes(self)
        made = memory_plan(self, config_of(self), processes, self.device_type)
        return [*describe(made, processes, self.parallel.described), *check(made, device_of(self), RELIEF)]

    def to_export(self) -> ChatRecipe:
        """Without the base where nothing of it is written: of an adapter its own weights alone, of a model all of whose
        weights learn those. Otherwise in the machine's memory, whatever the GPUs hold."""
        alone = replace(self, parallel=ParallelOptions(), result="last", recompute=False)
        if self.method == "full":
            return replace(alone, device="cpu" if self.freeze else "meta")
        return replace(alone, device="meta", method="lora")

    def usage(self, result: Path) -> str:
        whole = self.method == "full"
        return super().usage(result) if whole else f"llama-mm chat --model {self.model} --adapter {result}"

    def task(self, group: Group) -> Task:
        from .task import ChatTask

        return ChatTask(self, group)
