"""Pack a model's linear layers: bf16 as it is, int8 or int4 with a scale for every group of a row, fp8 with one a row.

Shapes: N outputs · K inputs · G values of a group
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast, get_args

import torch
from torch import Tensor

from .. import ops
from ..config import TextConfig, spared
from ..errors import ConfigError, DeviceError
from ..models import LanguageModel
from ..models.layers import Linear, PackedLinear, Projections
from ..models.llama import CrossAttentionBlock
from ..ops import INTEGERS, Format, PackedWeight
from ..ops.huge_pages import empty_parameter


@dataclass(frozen=True)
class Packing:
    """How a model's linear layers are packed.

    format: "bf16" loses nothing on a bf16 model. group: values of a row that share a scale. symmetric: whether zero is
    the middle of the range (see `ops.pack_weight`); fp8 has a scale a row and is symmetric. lm_head: the LM head's
    format, which is the one whose rounding hurts most; None takes `format`. keep: globs of layers that stay as they
    are, by dotted names or the ends of such, as "lm_head", "layers.0.*" or "down_proj"; a gated block's attention is
    called `cross_attention`. One that names a layer of several that run as one product names them all.

    Raises:
        ConfigError: no such format, or no such mixture of them.
    """

    format: Format
    group: int = 32
    symmetric: bool = True
    lm_head: Format | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        formats = {self.format, self.lm_head or self.format}
        for format in formats:
            if format not in get_args(Format):
                raise ConfigError(f'weights are packed as {", ".join(get_args(Format))}, not as "{format}"')
        if "fp8" in formats and formats & set(INTEGERS):
            raise ConfigError("no file holds fp8 and whole numbers in one model; choose one, or bf16 for the LM head")

    def format_of(self, path: str) -> Format:
        """What one of `packable_layers` becomes."""
        return self.lm_head or self.format if path == LM_HEAD else self.format


LM_HEAD = "decoder.lm_head"


def recommended(format: Format, text: TextConfig) -> Packing:
    """A packing that spares what rounding to `format` hurts most (`config.spared`)."""
    lm_head, keep = spared(format, text)
    return Packing(format, lm_head=cast("Format | None", lm_head), keep=keep)


def pack(model: LanguageModel, packing: Packing | Format) -> LanguageModel:
    """Pack the decoder's linear layers in place, each as soon as its plain weight can be freed; returns the model.

    Queries, keys and values become one product, gate and up another. The vision encoder and the projector run once an
    image over many rows, where a plain product is faster: they stay as they are.

    Raises:
        ConfigError: a width that does not divide into groups, a name to keep that is not there, weights that are
            packed already, or adapters.
    """
    packing = packing if isinstance(packing, Packing) else Packing(packing)
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ConfigError("the model's weights are packed already; load it again to pack it otherwise")
    for module in model.decoder.modules():
        if isinstance(module, Projections) and not all(isinstance(layer, Linear) for layer in module.children()):
            raise ConfigError("the model's layers were changed (adapters or NF4); pack it before, or merge the adapter")
    for path in layers_to_pack(model, packing):
        pack_layer(model, path, packing)
    return model


def use_int8_activations(model: LanguageModel) -> LanguageModel:
    """Round what goes into the int8 and int4 layers to 8 bits too ("W8A8", "W4A8"), token by token and 32 inputs at a
    time (`ops.round_activations`), which is faster on a CPU; with AMX, 24 rows of bf16 and more are not rounded, which
    is faster there. A choice of this run: files do not hold it.

    Raises:
        ConfigError: no layer has int8 or int4 weights, or their groups do not go with it.
        DeviceError: the model is not on a CPU.
    """
    layers = [x for x in model.modules() if isinstance(x, PackedLinear) and x.format in INTEGERS]
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


def use_fp8_activations(model: LanguageModel) -> LanguageModel:
    """Round what goes into the fp8 layers to fp8 too, token by token ("W8A8", `ops.round_to_fp8`). Files hold it.
    Hopper GPUs have products for it.

    Raises:
        ConfigError: no layer has fp8 weights.
    """
    layers = [x for x in model.modules() if isinstance(x, PackedLinear) and x.format == "fp8"]
    if not layers:
        raise ConfigError("fp8 activations go with fp8 weights, which the model lacks; pack it as fp8")
    for layer in layers:
        layer.fp8_activations = True
    return model


def packable_layers(model: LanguageModel) -> dict[str, tuple[str, ...]]:
    """Dotted path of every layer that `pack` can replace → the parameters it holds."""
    return {path: tuple(f"{path}.{name}" for name, _ in layer.named_parameters()) for path, layer in _outermost(model)}


def layers_to_pack(model: LanguageModel, packing: Packing) -> list[str]:
    """Those of `packable_layers` that `packing` does not keep, in their order.

    Raises:
        ConfigError: a glob that no layer's name fits, or widths that do not divide into groups.
    """
    names = {path: _names(model, path, parameters) for path, parameters in packable_layers(model).items()}
    kept: set[str] = set()
    for glob in packing.keep:
        found = [path for path, known in names.items() if any(_fits(name, glob) for name in known)]
        if not found:
            raise ConfigError(f'no layer is called "{glob}", so it cannot be kept; some are {_some(model, names)}')
        kept.update(found)
    chosen = [path for path in names if path not in kept]
    _check_groups(model, chosen, packing)
    return chosen


def _names(model: LanguageModel, path: str, parameters: tuple[str, ...]) -> set[str]:
    """What a layer may be called in `Packing.keep`: its path, and those of the layers that run with it."""
    called = {path, *(name.removesuffix(".weight") for name in parameters)}
    block = model.get_submodule(".".join(path.split(".")[:3]))
    if isinstance(block, CrossAttentionBlock):
        called = {name.replace(".attention.", ".cross_attention.") for name in called}
    return called


def _fits(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}")


def _some(model: LanguageModel, names: dict[str, set[str]]) -> str:
    kinds = {_kind(name): None for path in names for name in sorted(names[path])}
    return ", ".join(list(kinds)[:12])


def _kind(path: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", path.removeprefix("decoder."))


def _check_groups(model: LanguageModel, paths: list[str], packing: Packing) -> None:
    """Raises:
    ConfigError: it names all layers whose width does not divide, and groups that would.
    """
    widths = {path: _linears(model, path)[0].in_features for path in paths}
    wrong: dict[int, dict[str, None]] = {}
    for path, width in widths.items():
        if not ops.divides(width, packing.format_of(path), packing.group):
            wrong.setdefault(width, {})[_kind(path)] = None
    if wrong:
        where = "; ".join(f"the {width} inputs of {', '.join(kinds)}" for width, kinds in wrong.items())
        groups = [str(group) for group in (16, 32, 64, 96, 128) if not any(w % group for w in widths.values())]
        choice = f"choose {' or '.join(groups)}" if groups else "choose another group"
        raise ConfigError(
            f"groups of {packing.group} do not divide {where}; {choice}, or keep those layers as they are"
        )


def _linears(model: LanguageModel, path: str) -> list[Linear]:
    layer = model.get_submodule(path)
    return [layer] if isinstance(layer, Linear) else [x for x in layer.children() if isinstance(x, Linear)]


def _outermost(model: LanguageModel) -> Iterator[tuple[str, Linear | Projections]]:
    within = "\0"
    for path, module in model.decoder.named_modules(prefix="decoder"):
        if isinstance(module, Linear | Projections) and not path.startswith(within):
            within = path + "."
            yield path, module


def bytes_of(rows: int, columns: int, packing: Packing, path: str) -> int:
    """What the weight [rows, columns] of one of `packable_layers` takes once it is packed."""
    format = packing.format_of(path)
    if format not in INTEGERS:
        return 2 * rows * columns if format == "bf16" else rows * (columns + 4)
    bits, of_group = 8 if format == "int8" else 4, 2 if packing.symmetric else 3
    return rows * (columns * bits // 8 + columns // packing.group * of_group)


def plain_weight(model: LanguageModel, path: str) -> Tensor:
    """The weight [N, K] of one of `packable_layers`; of several that run as one product, side by side."""
    weights = [linear.weight.detach() for linear in _linears(model, path)]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


@torch.no_grad()
def pack_layer(model: LanguageModel, path: str, packing: Packing) -> None:
    """Replace one of `packable_layers` by its packed form.

    Raises:
        ConfigError: its values do not fit the format.
    """
    weight, format = plain_weight(model, path), packing.format_of(path)
    try:
        packed = ops.pack_weight(weight, format, group=packing.group, symmetric=packing.symmetric)
    except ValueError as error:
        raise ConfigError(f"{error} ({path}); choose another group or format") from error
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
