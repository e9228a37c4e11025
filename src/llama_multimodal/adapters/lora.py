"""LoRA as a transformation of a built model: apply, switch, merge, undo.

model, processor = load("meta-llama/Llama-3.2-11B-Vision-Instruct")
apply_lora(model, LoraConfig(rank=16, alpha=32, targets=("self", "cross")))
…                                   # train: only the adapter's parameters want gradients
save_adapter(model, "my-adapter")   # in PEFT's format
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import nearest
from ..errors import ConfigError
from ..models import LanguageModel
from ..models.layers import PackedLinear
from ..quant.nf4 import Nf4Linear
from .config import LoraConfig
from .layers import AdapterSet, BaseLayer, Choice, Joined, Lora, LoraLinear, LoraProjections, LowRank, Part, Rows
from .targets import Place, resolve


def apply_lora(model: LanguageModel, config: LoraConfig, name: str = "default") -> LanguageModel:
    """Give a model a new adapter, which adds nothing yet, and freeze the rest; returns the model.

    The model's weights may be packed already. The first adapter is in force outside of `use_adapter`.

    Raises:
        ConfigError: a target that means nothing in this model, a name that is taken, or adapters that are merged.
    """
    chosen = resolve(model, config)
    adapters = _adapters_for(model, name)
    if not adapters.configs:
        model.requires_grad_(False)
    with torch.no_grad():
        for place, rank, alpha in chosen.values():
            lora = _lora_at(model, place, adapters)
            dtype = torch.float32 if config.dtype == "float32" else model.dtype
            base = _base_at(model, place)
            pair = LowRank(place.shape, config, rank, alpha, base.tensors()[0].device, dtype)
            if config.dora:
                pair.add_magnitude(base)
            lora[name] = pair.train(lora.training)
    adapters.configs[name] = config
    adapters.changes += 1
    adapters.numbers[name] = adapters.changes
    if adapters.default is None:
        adapters.default = adapters.choice = name
    return model


@contextmanager
def use_adapter(model: LanguageModel, choice: str | Sequence[str | None] | Tensor | Rows | None) -> Iterator[None]:
    """Inside the `with` block, answer with an adapter, or with none, or with one for each row of the batch.

    A stream of `generate` is read inside the block too. One thread at a time can be inside.

    choice: a name; None for the plain model; a sequence of them, one a row; or int64 [B] (or [B, T] for every token):
        indices into `adapter_names(model)`, -1 for none; or what `fixed_rows` made of those. Rows of different
        adapters share one batch, and each gives what it gives alone; layers that read images take one adapter at a
        time.

    Raises:
        ConfigError: no such adapter, adapters that are merged, or another thread inside.
    """
    adapters = adapter_set(model)
    wanted = _choice(adapters, choice, model.device)
    if adapters.merged:
        raise ConfigError("an adapter is merged into this model; call unmerge_lora before choosing another")
    thread, before, user = threading.get_ident(), adapters.choice, adapters.user
    if user not in (None, thread):
        raise ConfigError("another thread is inside use_adapter of this model; take turns, or give each row its own")
    adapters.choice, adapters.user = wanted, thread
    try:
        yield
    finally:
        adapters.choice, adapters.user = before, user


def fixed_rows(model: LanguageModel, index: Tensor, kept: dict[str, Joined]) -> Rows:
    """A choice for a step that is recorded and run again: the index is read anew each time, all else stays.

    What layers make of the adapters they make once and put in `kept`, which steps may share. It holds good until
    `adapter_changes` is another or the weights change; whoever recorded a step holds it as long as the step.

    index: int64 [B] or [B, T], into `adapter_names(model)`, -1 for none; its values are not checked
    """
    return Rows(adapter_names(model), index, kept)


def adapter_in_force(
    model: LanguageModel, choice: str | Sequence[str | None] | Tensor | Rows | None
) -> AbstractContextManager[None]:
    """`use_adapter`, where there is something to choose: not without adapters, nor where one is in the weights."""
    return use_adapter(model, choice) if adapter_names(model) and not _find(model).merged else nullcontext()


def adapter_changes(model: LanguageModel) -> int:
    """How often an adapter came, went, or was merged or unmerged."""
    return _find(model).changes


def adapter_numbers(model: LanguageModel) -> dict[str, int]:
    """The model's adapters in the order they came, and a number that tells two of one name apart."""
    return dict(_find(model).numbers)


def adapter_names(model: LanguageModel) -> tuple[str, ...]:
    """The model's adapters, in the order they came."""
    return tuple(_find(model).configs)


def remove_adapter(model: LanguageModel, name: str | None = None) -> LanguageModel:
    """Take one adapter away, or all; without any the model is the plain one again, its weights still frozen.

    Raises:
        ConfigError: no such adapter, or adapters that are merged.
    """
    adapters = adapter_set(model)
    if adapters.merged:
        raise ConfigError("an adapter is merged into this model; call unmerge_lora before removing one")
    for gone in tuple(adapters.configs) if name is None else (_known(adapters, name),):
        del adapters.configs[gone], adapters.numbers[gone]
        for lora in _loras(model):
            if gone in lora:
                del lora[gone]
    adapters.changes += 1
    adapters.default = adapters.choice = next(iter(adapters.configs), None)
    for path, module in _wrappers(model):
        if isinstance(module, LoraProjections):
            for part in [part for part, lora in module.loras() if not len(lora)]:
                del module.lora[part]
        if not len(module.lora):
            _put(model, path, module.base)
    return model


# --- merging ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Merged:
    """A layer whose weight holds an adapter now, and what it was: the wrapper, and the very parameter."""

    path: str
    wrapper: LoraLinear
    weight: nn.Parameter


@torch.no_grad()
def merge_lora(model: LanguageModel, name: str | None = None) -> LanguageModel:
    """Put an adapter into the weights, so that the model is a plain one and as fast; it can be saved, or packed.

    The weights before are kept for `unmerge_lora`. name: None takes the first that came.

    Raises:
        ConfigError: no such adapter, one is merged already, or weights that are packed or tied and cannot hold it.
    """
    adapters = adapter_set(model)
    if adapters.merged:
        raise ConfigError("an adapter is merged already; call unmerge_lora first")
    name = _known(adapters, str(adapters.default) if name is None else name)
    wrappers = list(_wrappers(model))
    for path, module in wrappers:
        base = module.base
        if isinstance(base, PackedLinear) or not isinstance(base, nn.Linear):
            raise ConfigError(
                f"{path} has packed weights, which would be rounded again; load the model unpacked, merge, then pack it"
            )
        if base.weight is model.decoder.embedding.weight:
            raise ConfigError(f"{path} is the embedding's own table; an adapter of it cannot be merged")
    adapters.changes += 1
    for path, module in wrappers:
        assert isinstance(module, LoraLinear) and isinstance(module.base, nn.Linear)
        base, weight = module.base, module.base.weight
        assert isinstance(weight, nn.Parameter)
        adapters.merged.append(_Merged(path, module, weight))
        if name in module.lora:
            base.weight = nn.Parameter(_merged_weight(module, module.lora[name]), requires_grad=weight.requires_grad)
        _put(model, path, base)
    return model


def unmerge_lora(model: LanguageModel) -> LanguageModel:
    """Undo `merge_lora`: the weights are those from before, bit for bit, and the adapters add to them again.

    Raises:
        ConfigError: nothing is merged, or the model's layers were replaced since (packed, for one).
    """
    adapters = adapter_set(model)
    if not adapters.merged:
        raise ConfigError("no adapter is merged into this model")
    modules = dict(model.named_modules())
    for one in adapters.merged:
        if modules.get(one.path) is not one.wrapper.base:
            raise ConfigError(f"{one.path} was replaced since the adapter was merged; load the model again")
    for one in adapters.merged:
        base = one.wrapper.base
        assert isinstance(base, nn.Linear)
        device, dtype = base.weight.device, base.weight.dtype
        base.weight = one.weight
        _put(model, one.path, one.wrapper.to(device).train(base.training))
        if dtype != one.weight.dtype:  # the model was converted meanwhile
            base.to(dtype)
    adapters.merged.clear()
    adapters.changes += 1
    return model


def _merged_weight(layer: LoraLinear, pair: LowRank) -> Tensor:
    weight = layer.dense()
    wide = torch.promote_types(torch.promote_types(weight.dtype, pair.A.dtype), torch.float32)
    merged = weight.to(wide) + pair.delta(wide)
    if pair.magnitude is not None:
        merged = merged * pair.stretch(layer, wide)[:, None]
    return merged.to(weight.dtype)


# --- counting --------------------------------------------------------------------------------------------------------


class ParameterCount(NamedTuple):
    """How many parameters are trained, of how many."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(1, self.total)
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({share:.2g} %)"


def count_parameters(model: nn.Module) -> ParameterCount:
    """A tied weight counts once, a packed one as many values as it stands for."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, PackedLinear):
            total += sum(rows * columns for rows, columns in module.shapes.values())
        elif isinstance(module, Nf4Linear):
            total += module.out_features * module.in_features
    return ParameterCount(trainable, total)


# --- the model's adapters ---------------------------------------------------------------------------------------------


def adapter_set(model: LanguageModel) -> AdapterSet:
    """The model's adapters.

    Raises:
        ConfigError: it has none.
    """
    found = _find(model)
    if not found.configs:
        raise ConfigError("this model has no adapter; call apply_lora or load_adapter first")
    return found


def adapter_pairs(model: LanguageModel, name: str) -> dict[str, LowRank]:
    """An adapter's part at every layer that has one, by the layer's path, in the model's order.

    Raises:
        ConfigError: no such adapter.
    """
    _known(adapter_set(model), name)
    return {lora.path: lora[name] for lora in _loras(model) if name in lora}


def _find(model: LanguageModel) -> AdapterSet:
    found = getattr(model, "_adapters", None)
    return found if isinstance(found, AdapterSet) else AdapterSet()


def _adapters_for(model: LanguageModel, name: str) -> AdapterSet:
    """The model's adapters, which a new one of this name can join."""
    adapters = _find(model)
    if adapters.merged:
        raise ConfigError("an adapter is merged into this model; call unmerge_lora before adding another")
    if name in adapters.configs:
        raise ConfigError(f'there is an adapter "{name}" already; choose another name, or remove it first')
    if not re.fullmatch(r"[\w-]+", name) or hasattr(Lora(adapters, (0, 0), "", False), name):
        raise ConfigError(f'"{name}" is no name for an adapter; take letters, digits, - and _, such as "receipts"')
    model._adapters = adapters  # type: ignore[assignment]
    return adapters


def _known(adapters: AdapterSet, name: str) -> str:
    if name not in adapters.configs:
        have = ", ".join(adapters.configs)
        raise ConfigError(f'there is no adapter "{name}"; the model has {have}{nearest(name, adapters.configs)}')
    return name


def _choice(
    adapters: AdapterSet, choice: str | Sequence[str | None] | Tensor | Rows | None, device: torch.device
) -> Choice:
    if choice is None or isinstance(choice, Rows):
        return choice
    if isinstance(choice, str):
        return _known(adapters, choice)
    if isinstance(choice, Tensor):
        count = len(adapters.configs)
        inside = choice.device.type != "cpu" or bool(((choice >= -1) & (choice < count)).all())
        if choice.dtype != torch.int64 or choice.ndim not in (1, 2) or not inside:
            raise ConfigError(f"adapters by index are int64 [B] or [B, T], from -1 to {count - 1}, not {choice}")
        return Rows(tuple(adapters.configs), choice.to(device))
    wanted = {_known(adapters, name) for name in choice if name is not None}
    names = tuple(name for name in adapters.configs if name in wanted)
    if len(set(choice)) == 1:  # layers that read images can go on
        return choice[0]
    index = [-1 if name is None else names.index(name) for name in choice]
    return Rows(names, torch.tensor(index, device=device))


def _wrappers(model: LanguageModel) -> list[tuple[str, LoraLinear | LoraProjections]]:
    return [(path, x) for path, x in model.named_modules() if isinstance(x, LoraLinear | LoraProjections)]


def _loras(model: LanguageModel) -> list[Lora]:
    """Those of merged layers too, which are no part of the model meanwhile."""
    parked = [one.wrapper.lora for one in _find(model).merged]
    return [module for module in model.modules() if isinstance(module, Lora)] + parked


def base_weight(model: LanguageModel, place: Place) -> Tensor:
    """The weight [N, K] that adapters add to, as plain numbers."""
    return _base_at(model, place).dense()


def _base_at(model: LanguageModel, place: Place) -> BaseLayer:
    module = model.get_submodule(place.module)
    if place.part is not None:
        assert isinstance(module, LoraProjections | PackedLinear)
        return Part(module.base if isinstance(module, LoraProjections) else module, place.part)
    if isinstance(module, LoraLinear):
        return module
    return LoraLinear(module, Lora(AdapterSet(), place.shape, place.path, place.reads_images))


def _lora_at(model: LanguageModel, place: Place, adapters: AdapterSet) -> Lora:
    """Where a layer's adapters are, made where it has none yet."""
    module = model.get_submodule(place.module)
    new = Lora(adapters, place.shape, place.path, place.reads_images).train(module.training)
    if place.part is None:
        if not isinstance(module, LoraLinear):
            module = LoraLinear(module, new).train(module.training)
            _put(model, place.module, module)
        return module.lora
    if not isinstance(module, LoraProjections):
        assert isinstance(module, PackedLinear)
        module = LoraProjections(module).train(module.training)
        _put(model, place.module, module)
    if place.part not in module.lora:
        module.lora[place.part] = new
    found = module.lora[place.part]
    assert isinstance(found, Lora)
    return found


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
