"""Pack a model's linear layers: bf16 as it is, int8 or int4 with a scale for every group of a row.

Shapes: N outputs · K inputs · G values of a group
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from .. import ops
from ..errors import ConfigError, DeviceError
from ..models import LanguageModel
from ..models.layers import Linear, PackedLinear, Projections
from ..ops import Format, PackedWeight
from ..ops.huge_pages import empty_parameter


@dataclass(frozen=True)
class Packing:
    """How a model's linear layers are packed.

    format: "bf16" loses nothing on a bf16 model. group: values of a row that share a scale. symmetric: whether zero is
    the middle of the range (see `ops.pack_weight`). lm_head: the LM head's format, which is the one whose rounding
    hurts most; None takes `format`.

    Raises:
        ConfigError: no such format.
    """

    format: Format
    group: int = 32
    symmetric: bool = True
    lm_head: Format | None = None

    def __post_init__(self) -> None:
        for format in (self.format, self.lm_head or self.format):
            if format not in get_args(Format):
                raise ConfigError(f'weights are packed as {", ".join(get_args(Format))}, not as "{format}"')


def pack(model: LanguageModel, packing: Packing | Format) -> LanguageModel:
    """Pack the decoder's linear layers in place, each as soon as its plain weight can be freed; returns the model.

    Queries, keys and values become one product, gate and up another. The vision encoder and the projector run once an
    image over many rows, where a plain product is faster: they stay as they are.

    Raises:
        ConfigError: a width that does not divide into groups, weights that are packed already, or adapters.
    """
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ConfigError("the model's weights are packed already; load it again to pack it otherwise")
    for module in model.decoder.modules():
        if isinstance(module, Projections) and not all(isinstance(layer, Linear) for layer in module.children()):
            raise ConfigError("the model's layers were changed (adapters or NF4); pack it before, or merge the adapter")
    for path in packable_layers(model):
        pack_layer(model, path, packing)
    return model


def use_int8_activations(model: LanguageModel) -> LanguageModel:
    """Round what goes into the int8 and int4 layers to 8 bits too ("W8A8", "W4A8"), token by token and 32 inputs at a
    time (`ops.round_activations`), which is faster on a CPU. A choice of this run: files do not hold it.

    Raises:
        ConfigError: no layer has int8 or int4 weights, or their groups do not go with it.
        DeviceError: the model is not on a CPU.
    """
    layers = [x for x in model.modules() if isinstance(x, PackedLinear) and x.format != "bf16"]
    if not layers:
        raise ConfigError("8-bit activations go with int8 or int4 weights, which the model lacks; pack it as one")
    if model.device.type not in ("cpu", "meta"):
        raise DeviceError(f"8-bit activations are for CPUs, and the model is on {model.device}; leave them out there")
    if groups := {x.group for x in layers if x.group % ops.ACTIVATION_BLOCK}:
        raise ConfigError(
            f"8-bit activations take groups of a multiple of {ops.ACTIVATION_BLOCK}, not {min(groups)}; pack it so"
        )
    for layer in layers:
        layer.int8_activations = True
    return model


def packable_layers(model: LanguageModel) -> dict[str, tuple[str, ...]]:
    """Dotted path of every layer that `pack` replaces → the parameters it holds."""
    return {path: tuple(f"{path}.{name}" for name, _ in layer.named_parameters()) for path, layer in _outermost(model)}


def _outermost(model: LanguageModel) -> Iterator[tuple[str, Linear | Projections]]:
    within = "\0"
    for path, module in model.decoder.named_modules(prefix="decoder"):
        if isinstance(module, Linear | Projections) and not path.startswith(within):
            within = path + "."
            yield path, module


@torch.no_grad()
def pack_layer(model: LanguageModel, path: str, packing: Packing | Format) -> None:
    """Replace one of `packable_layers` by its packed form.

    Raises:
        ConfigError: its width does not divide into groups, or its values do not fit the format.
    """
    packing = packing if isinstance(packing, Packing) else Packing(packing)
    layer = model.get_submodule(path)
    assert isinstance(layer, Linear | Projections)
    format = packing.lm_head or packing.format if layer is model.decoder.lm_head else packing.format
    linears = [layer] if isinstance(layer, Linear) else [x for x in layer.children() if isinstance(x, Linear)]
    weight = linears[0].weight if len(linears) == 1 else torch.cat([x.weight for x in linears])
    try:
        packed = ops.pack_weight(weight, format, group=packing.group, symmetric=packing.symmetric)
    except ValueError as error:
        raise ConfigError(f"{error}; choose another group or format") from error
    put_packed(model, path, packed)


def put_packed(model: LanguageModel, path: str, weight: PackedWeight) -> None:
    """Replace one of `packable_layers` by a packed weight of its shape, in the plain layout."""
    layer = model.get_submodule(path)
    parts = None
    if isinstance(layer, Projections):
        parts = {name: x.out_features for name, x in layer.named_children() if isinstance(x, Linear)}
    bias = layer.bias if isinstance(layer, Linear) else None
    parent, _, name = path.rpartition(".")
    packed = PackedLinear(ops.prepare_weight(weight).mapped(_in_huge_pages), bias, parts)
    setattr(model.get_submodule(parent), name, packed)


def _in_huge_pages(tensor: Tensor) -> Tensor:
    if not tensor.is_cpu:  # nothing to gain by a copy
        return tensor
    return empty_parameter(tuple(tensor.shape), tensor.dtype, tensor.device).copy_(tensor)
