"""A model that several processes hold in parts: cut before it has memory, and then each reads what is its own.

Every process goes through the checkpoint's files and keeps its part of each weight: whole is one weight at a time, on
the CPU. Those of one machine share what the system keeps of the files in memory.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ...adapters.layers import LowRank, draw
from ...distributed import fill_parameter, gather_for, gather_once, local_part, parallelize, shard_model
from ...errors import ConfigError, DeviceError
from ...loading import open_model, pick_dtype, stored_dtype
from ...models import LanguageModel
from ...processing.processor import Processor
from ...weights.checkpoint import Checkpoint, build_on_meta, read_parameters
from ..parallel import Group
from .model import make_trainable, product_dtype
from .parts import part_of
from .recipe import ChatRecipe


def load_parts(recipe: ChatRecipe, group: Group, device: torch.device) -> tuple[LanguageModel, Processor, torch.dtype]:
    """This process's part of what the recipe trains, its processor, and the dtype of the checkpoint.

    Raises:
        ConfigError: a model that cannot be cut so.
        DeviceError: the device is too small for the part.
    """
    assert group.mesh is not None
    checkpoint, processor = open_model(recipe.model)
    if checkpoint.packed:
        raise ConfigError(f"{recipe.model} has packed weights, which are not cut; take the plain checkpoint")
    stored = stored_dtype(checkpoint)
    read_in = stored if recipe.method == "full" else pick_dtype(recipe.dtype) or stored
    kind = product_dtype(recipe, device)
    model = make_trainable(build_on_meta(checkpoint.config).to(read_in), recipe, kind).train()
    parallelize(model, group.mesh)
    if group.sharded:
        precision = kind if recipe.method == "full" and kind != torch.float32 else None
        shard_model(model, group.mesh, precision=precision, reshard_after_forward=recipe.parallel.reshard_after_forward)
    try:
        give_memory(model, device)
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"a part of {recipe.model} does not fit {device}; take more processes") from error
    _read(model, checkpoint, read_in)
    torch.manual_seed(recipe.seed)
    draw_adapters(model, device)
    gather_once(model)
    return model, processor, stored


def give_memory(model: nn.Module, device: torch.device) -> None:
    """Memory, without values, for the parameters that have none; one that two layers share stays one."""
    made: dict[int, nn.Parameter] = {}
    kept: list[nn.Parameter] = []  # an id is its owner's only while that lives
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            if id(parameter) not in made:
                empty = torch.empty_like(parameter.detach(), device=device)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                kept.append(parameter)
            setattr(module, name, made[id(parameter)])


def draw_adapters(model: nn.Module, device: torch.device) -> None:
    """Initial values of adapters, drawn whole and in the model's order as one process draws them."""
    for pair in (module for module in model.modules() if isinstance(module, LowRank)):
        fill_parameter(pair.A, draw(torch.empty(pair.A.shape, dtype=pair.A.dtype, device=device)))
        fill_parameter(pair.B, torch.zeros((), dtype=pair.B.dtype, device=device).expand(pair.B.shape))


def _read(model: LanguageModel, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    ours = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    lengths = _lengths(model)
    for name, value in read_parameters(checkpoint, dtype):
        fill_parameter(ours[name], value)
        for magnitude in lengths.get(name, ()):
            fill_parameter(magnitude, torch.linalg.vector_norm(value.float(), dim=1).to(magnitude.dtype))


def plain_name(name: str) -> str:
    """A parameter's name before its layer had an adapter."""
    return name.replace(".base.", ".")


def _lengths(model: nn.Module) -> Mapping[str, list[Tensor]]:
    """By the name of a weight: what DoRA learns of the lengths of its rows."""
    found: dict[str, list[Tensor]] = {}
    for path, pair in model.named_modules():
        if isinstance(pair, LowRank) and pair.magnitude is not None:
            found.setdefault(f"{path.partition('.lora.')[0]}.weight", []).append(pair.magnitude)
    return found


def add_method(model: nn.Module, name: str, function: Any) -> None:
    """Make a function of a sharded model a method of it, for which its weights are gathered."""
    setattr(model, name, types.MethodType(function, model))
    gather_for(model, name)


def unread(model: LanguageModel) -> Tensor:
    """Zero, and zero gradients for what is gathered together with embedding and head and reads pictures alone.

    For micro-batches without any: FSDP exchanges what is gathered together in one dtype, and with `precision` gradients
    of earlier micro-batches wait in fp32, while such as come with the last one alone are narrower.
    """
    total = torch.zeros((), device=model.device)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and part_of(name, model.config.text) == "projector":
            total = total + 0.0 * local_part(parameter).sum()
    return total


def prepare_answers(model: nn.Module) -> None:
    """Before a sharded model generates: the dtype of its gathered weights is that of the caches."""
    if isinstance(model, FSDPModule):
        model.unshard()


def reshard(model: nn.Module) -> None:
    """Let the weights go that a forward pass without a backward pass leaves gathered."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
