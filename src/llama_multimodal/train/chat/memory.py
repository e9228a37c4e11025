"""The memory that a fine-tuning run plans for, from its recipe and its model's configuration."""

from __future__ import annotations

from ...adapters.targets import PRESETS, resolve
from ...config import AnyModelConfig, LanguageModelConfig, ModelConfig
from ...loading import locate
from ...planning import MemoryPlan, Packed, PlanOptions, plan
from ...planning.options import TARGETS
from ...weights.checkpoint import build_on_meta, open_checkpoint
from ...zoo.configs import find_config
from .encode import max_length
from .recipe import ChatRecipe

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def config_of(recipe: ChatRecipe) -> AnyModelConfig:
    """The base model's configuration; no weight is read."""
    known = find_config(recipe.model)
    return known if known is not None else open_checkpoint(locate(recipe.model)).config


def memory_plan(recipe: ChatRecipe, config: AnyModelConfig, processes: int, device: str) -> MemoryPlan:
    """Of one process, for its fullest micro-batch: conversations of the greatest length, each with a picture, which is
    cut into as many tiles as there can be.

    Raises:
        ConfigError: processes that the recipe cannot be divided among, or targets that the model does not have.
    """
    mesh = recipe.parallel.mesh(processes)
    data, shard, tensor = mesh.sizes(processes)
    mine = -(-recipe.batch.rows // (data * shard))  # rows of a step
    longest = max_length(recipe.data, config)
    most = min(recipe.batch.rows_at_once or mine, mine)  # conversations of a micro-batch
    if recipe.batch.packing:
        rows, packed = 1, min(-(-max(longest, recipe.batch.tokens) // longest), most)
        context = min(max(longest, recipe.batch.tokens), packed * longest)
    else:
        rows, packed, context = min(max(1, recipe.batch.tokens // longest), most), 1, longest
    rank, targets = _adapters(recipe, config)
    return plan(
        config,
        PlanOptions(
            dtype=_DTYPES[recipe.dtype],  # type: ignore[arg-type]
            context=context,
            batch=rows,
            packed=packed,
            images=context // longest if isinstance(config, ModelConfig) else None,
            pack=Packed("nf4") if recipe.method == "qlora" else None,
            train="full" if recipe.method == "full" else "lora",
            rank=rank,
            targets=targets,
            gradient_checkpointing=recipe.recompute,
            optimizer="adamw8bit" if recipe.optim.optimizer == "adamw8bit" else "adamw",
            freeze=recipe.freeze,
            accumulate=mine > rows,
            average=recipe.optim.ema_decay is not None,
            tensor=tensor,
            gpus=shard,
            device="cuda" if device == "cuda" else "cpu",
        ),
    )


def _adapters(recipe: ChatRecipe, config: AnyModelConfig) -> tuple[int, tuple[str, ...]]:
    """The largest rank, and the groups of layers that have an adapter. A glob counts for its whole group."""
    if recipe.method == "full":
        return recipe.lora.rank, ("self",)
    patterns = recipe.lora.patterns
    if all(pattern in PRESETS for pattern in patterns) and not recipe.lora.rank_pattern:
        groups, rank = {group for pattern in patterns for group in PRESETS[pattern]}, recipe.lora.rank
    else:
        found = resolve(build_on_meta(config), recipe.lora).values()
        groups, rank = {place.group for place, _, _ in found}, max(rank for _, rank, _ in found)
    if isinstance(config, LanguageModelConfig):
        groups -= {"vision", "projector"}
    return rank, tuple(group for group in TARGETS if group in groups) or ("self",)
