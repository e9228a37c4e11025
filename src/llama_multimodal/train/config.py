"""What every training recipe says: where the run lies, how long it is, how it learns, and what is kept and watched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..distributed import ParallelConfig
from ..errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from .parallel import Group
    from .task import Task


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its rate over the steps: a warm-up, then a schedule.

    Weight decay is decoupled and touches matrices only. `muon` updates the blocks' matrices by Muon, at the step size
    that AdamW would have, and everything else by AdamW; `adamw8bit` keeps its moments in 8 bits.
    """

    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    learning_rate: float = 1e-4
    learning_rates: Mapping[str, float] = field(default_factory=dict)  # of parts that have a rate of their own
    lora_plus_ratio: float = 1.0  # how many times A's rate an adapter's B has (LoRA+); 1: one rate for both
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_share: float = 0.0  # of the rate, where cosine and linear end
    decay_steps: int = 0  # of `constant`: last steps, over which it falls to zero
    clip_norm: float = 1.0
    ema_decay: float | None = None  # the averaged weights are what is evaluated and kept; None keeps the last ones

    def __post_init__(self) -> None:
        if any(isinstance(rate, bool) or not isinstance(rate, int | float) for rate in self.learning_rates.values()):
            raise ConfigError("optim.learning_rates: every part's rate must be a number")
        rates = (self.learning_rate, *self.learning_rates.values())
        if min(rates) < 0 or self.clip_norm <= 0:
            raise ConfigError("optim: learning rates must not be negative, and clip_norm must be above 0")
        if self.lora_plus_ratio <= 0:
            raise ConfigError(f"optim.lora_plus_ratio must be above 0, not {self.lora_plus_ratio}")
        if self.optimizer == "muon" and (self.learning_rates or self.lora_plus_ratio != 1):
            raise ConfigError(
                "optim: muon has one rate for all; leave learning_rates and lora_plus_ratio out, or take adamw"
            )
        if self.learning_rates and self.learning_rate == 0:
            raise ConfigError(
                "optim: learning_rate is 0, and the parts' own rates are scheduled by it; freeze parts instead"
            )


@dataclass(frozen=True)
class WatchConfig:
    """Where the numbers go besides the terminal and metrics.jsonl."""

    tensorboard: bool = False
    wandb: str | None = None  # a project's name


@dataclass(frozen=True)
class ParallelOptions:
    """How the processes of a run share the model; there are as many as torchrun starts, or as `processes` says.

    With `ddp` each holds all that the recipe trains, and all that it does not; with `fsdp` weights, gradients and the
    optimizer's state are cut among them, and products run in the recipe's `dtype`. `tensor_parallel` neighbours share
    every product of a block, under either, and read the same rows.
    """

    method: Literal["ddp", "fsdp"] = "ddp"
    tensor_parallel: int = 1
    replicas: int = 1  # of the cut model (fsdp): machines, say, between which only gradients go
    reshard_after_forward: bool = True  # a block's weights (fsdp); False: gathered once a pass, and kept until then

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "replicas"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name} must be at least 1, not {getattr(self, name)}")
        if self.method != "fsdp" and (self.replicas > 1 or not self.reshard_after_forward):
            raise ConfigError("parallel: replicas and reshard_after_forward are for the method fsdp")

    @property
    def cuts(self) -> bool:
        """Whether the model is cut into parts where there are several processes."""
        return self.method == "fsdp" or self.tensor_parallel > 1

    @property
    def described(self) -> str:
        """In a few words."""
        parts = f" × tensor_parallel {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        return self.method + (f", {self.replicas} replicas" if self.replicas > 1 else "") + parts

    def mesh(self, processes: int) -> ParallelConfig:
        """The axes of so many processes.

        Raises:
            ConfigError: they cannot be divided so.
        """
        copies, rest = divmod(processes, self.tensor_parallel)
        if rest or not copies or copies % self.replicas:
            wanted = f"tensor_parallel {self.tensor_parallel}" + f" × replicas {self.replicas}" * (self.replicas > 1)
            raise ConfigError(
                f"parallel: {wanted} does not divide the {processes} process{'es' * (processes > 1)} of this run;"
                " change it, or torchrun's --nproc-per-node and --nnodes"
            )
        if self.method == "ddp":
            return ParallelConfig(copies, 1, self.tensor_parallel)
        return ParallelConfig(self.replicas, copies // self.replicas, self.tensor_parallel)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run; what it trains, and on what, is added by the task's own recipe."""

    TASK: ClassVar[str]
    """The recipe's `task`."""
    SECTIONS: ClassVar[Mapping[str, Any]] = {"optim": OptimConfig, "watch": WatchConfig}
    """The keys that are tables, and the configuration of each or what reads it; `a.b` for a table within a table."""

    output: str
    steps: int
    optim: OptimConfig = OptimConfig()
    watch: WatchConfig = WatchConfig()
    # Of the products; trained weights and sums stay in float32. A CPU without bf16 arithmetic, which would emulate it
    # at a tenth of its speed, multiplies in float32 either way. float16 scales the loss: gradients would vanish.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0
    deterministic: bool = False  # refuse whatever may sum in another order the next time
    processes: int = 1  # data-parallel, where torchrun does not say it: each takes its share of every step's examples
    threads: int | None = None  # of each process; None: as many as torch would take
    save_every: int = 100
    keep_last: int = 2  # saved steps
    keep_best: bool = True  # and the saved step that evaluated best
    result: Literal["last", "best"] = "last"  # which of them becomes the model or adapter

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "keep_last", "processes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1")
        if self.optim.lora_plus_ratio != 1 and not self.adapts:
            raise ConfigError("optim.lora_plus_ratio is for the methods lora and qlora, which train A and B")

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained, and not the weights."""
        return False

    def notes(self) -> list[str]:
        """What people want to know before a run begins."""
        return []

    def usage(self, result: Path) -> str:
        """The command that asks the result."""
        return f"llama-mm chat --model {result}"

    @property
    def sharing(self) -> ParallelOptions:
        """How its processes share the model: here each has all of it."""
        return ParallelOptions()

    @property
    def device_type(self) -> str:
        """cpu or cuda: where its processes compute, and talk."""
        return "cpu"

    def prepare(self) -> None:
        """What is done once, before the run's processes start."""

    def task(self, group: Group) -> Task:
        """Build what is trained, in one process of the run."""
        raise NotImplementedError

    def to_export(self) -> Recipe:
        """The recipe by which one process builds what it writes the result from; it needs no step."""
        return self

    @property
    def checkpoints(self) -> Path:
        return Path(self.output) / "checkpoints"


def read_table(path: str | Path) -> Mapping[str, Any]:
    """A recipe's file as it is written.

    Raises:
        ConfigError: no such file, not YAML, or not a table.
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
    return raw


Report = Callable[["Progress"], None]


@dataclass(frozen=True)
class Progress:
    """What one step did: losses are means over what was counted in the step, speeds are per second."""

    step: int
    values: Mapping[str, float]
