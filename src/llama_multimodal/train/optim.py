"""Optimizers and the learning rate over the steps of a run."""

from __future__ import annotations

import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import alike, fill_parameter
from ..errors import MissingExtraError
from .config import OptimConfig
from .muon import Muon


def scheduled(peak: float, step: int, steps: int, optim: OptimConfig) -> float:
    """The learning rate of a step, from 0: a linear warm-up, then the recipe's schedule."""
    warm = min(1.0, (step + 1) / max(1, optim.warmup_steps))
    if optim.schedule == "constant":
        return peak * warm * min(1.0, (steps - step) / max(1, optim.decay_steps))
    done = min(1.0, max(0, step - optim.warmup_steps) / max(1, steps - optim.warmup_steps))
    left = 1.0 - done if optim.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return peak * warm * (optim.final_share + (1.0 - optim.final_share) * left)


def build_optimizers(
    parameters: Mapping[str, nn.Parameter], optim: OptimConfig, part_of: Callable[[str], str] | None = None
) -> list[torch.optim.Optimizer]:
    """The recipe's optimizers over these parameters: only matrices decay, and each part has its own rate.

    part_of: the part of the model that a parameter belongs to, for `learning_rates`

    Raises:
        MissingExtraError: an 8-bit optimizer without the package that has it.
    """
    settings: dict[str, Any] = {"lr": optim.learning_rate, "weight_decay": optim.weight_decay}
    if optim.optimizer == "muon":
        blocks = [p for name, p in parameters.items() if p.ndim == 2 and "layers." in name]
        decayed = [p for name, p in parameters.items() if p.ndim == 2 and "layers." not in name]
        kept = [p for p in parameters.values() if p.ndim != 2]
        others: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW(others, betas=(optim.beta1, optim.beta2), fused=True, **settings)
        return [Muon(blocks, **settings), adamw] if blocks else [adamw]
    groups: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)  # by rate, and whether they decay
    for name, parameter in parameters.items():
        rate = optim.learning_rates.get(part_of(name), optim.learning_rate) if part_of else optim.learning_rate
        if name.endswith(".B"):
            rate *= optim.lora_plus_ratio
        groups[rate, parameter.ndim == 2].append(parameter)
    tables: list[dict[str, Any]] = [
        {"params": some, "share": rate / optim.learning_rate if optim.learning_rate else 1.0,
         "weight_decay": optim.weight_decay if decays else 0.0}
        for (rate, decays), members in groups.items() for some in alike(members)
    ]  # fmt: skip
    settings["betas"] = (optim.beta1, optim.beta2)
    if optim.optimizer == "adamw":
        return [torch.optim.AdamW(tables, fused=True, **settings)]
    return [_adamw_8bit()(tables, **settings)]


def _adamw_8bit() -> Any:
    """bitsandbytes' optimizer."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("qlora", "the optimizer adamw8bit")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit


def state_by_name(
    optimizers: Iterable[torch.optim.Optimizer], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Any]:
    """What optimizers remember of each parameter, by its name: of those that have learnt anything so far."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, Any] = {}
    for optimizer in optimizers:
        state = optimizer.state_dict()["state"]
        found |= {names[id(p)]: state[i] for i, p in enumerate(_members(optimizer)) if i in state}
    return found


def fill_optimizers(
    optimizers: Iterable[torch.optim.Optimizer], parameters: Mapping[str, nn.Parameter], state: Mapping[str, Any]
) -> None:
    """Give optimizers what `state_by_name` had of whole parameters; of those that are cut, this process's part."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        members = {i: p for i, p in enumerate(_members(optimizer)) if names[id(p)] in state}
        ours = {i: _part(state[names[id(p)]], p) for i, p in members.items()}
        optimizer.load_state_dict({"state": ours, "param_groups": optimizer.state_dict()["param_groups"]})


def _members(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """Parameters in the order in which its state counts them."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _part(value: Any, parameter: nn.Parameter) -> Any:
    """Moments, which are as large as their parameter, cut as it is; all else as it is."""
    if isinstance(value, Mapping):
        return {key: _part(one, parameter) for key, one in value.items()}
    if not isinstance(value, Tensor):
        return value
    if value.shape != parameter.shape:
        return value.clone()
    part = torch.empty_like(parameter.detach(), dtype=value.dtype)
    fill_parameter(part, value)
    return part
