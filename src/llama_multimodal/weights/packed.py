"""Packed weights in files: formats of compressed-tensors, which transformers and vLLM read too.

int8 and int4 are "pack-quantized": in the place of a linear layer's `weight` [N, K] there are

    weight_packed      int32 [N, K·bits/32]: values + 2^(bits-1), the first in the lowest bits
    weight_scale       [N, K/G], here fp16; [N, 1] where a row has one scale
    weight_zero_point  int32 [⌈N·bits/32⌉, K/G], packed like the values but down the rows; only where zero is not the
                       middle of the range
    weight_shape       int64 [2]: N and K

fp8 is "float-quantized": `weight` itself is float8_e4m3fn, and there is

    weight_scale       [N, 1], here fp32

With `input_activations` in `quantization_config` what goes into these layers is rounded to fp8 as well, token by token.

Which layers are packed, by how many bits and in which groups, all follows from the tensors; `quantization_config` in
config.json is checked when reading and written for others.

Shapes: N outputs · K inputs · G values of a group
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..ops import Format, PackedWeight
from ..ops.packed_linear import join_nibbles, split_nibbles
from . import nf4
from .io import TensorInfo
from .rules import Rule, Source

METHOD, INTEGER_FORMAT, FP8_FORMAT = "compressed-tensors", "pack-quantized", "float-quantized"
BITS: dict[Format, int] = {"int8": 8, "int4": 4}
FP8 = torch.float8_e4m3fn
_LAYER = re.compile(r"layers\.\d+\..+(?=\.weight$)")
_NEVER_PACKED = ("re:.*vision_model.*", "re:.*multi_modal_projector.*")
_DECODER, _LM_HEAD = "re:.*language_model.*_proj$", "re:.*lm_head$"
_DECODER_ALONE = "re:.*_proj$"


class StoredPacked(Protocol):
    """How one weight [N, K] of the decoder is packed in the files."""

    @property
    def name(self) -> str:
        """Of the plain weight in the files, "….weight"."""

    def infos(self) -> dict[str, TensorInfo]:
        """The stored tensors, widest dtype first."""

    def read(self, sources: Mapping[str, Source]) -> PackedWeight:
        """From tensors by their names in the files; the values may share their memory.

        Raises:
            CheckpointError: a shape or scales that contradict the rest.
        """

    def write(self, weight: PackedWeight) -> dict[str, Tensor]:
        """The stored tensors of a weight in the plain layout."""

    def config(self) -> dict[str, Any]:
        """Its kind, as `quantization_config` says it."""


@dataclass(frozen=True)
class StoredIntegers:
    """A `StoredPacked` of int8 or int4 in groups."""

    name: str
    format: Format
    shape: tuple[int, int]
    group: int
    symmetric: bool
    scale_dtype: torch.dtype = torch.float16

    def infos(self) -> dict[str, TensorInfo]:
        (rows, columns), per_word = self.shape, 32 // BITS[self.format]
        groups = columns // self.group
        found = {
            "shape": TensorInfo((2,), torch.int64),
            "packed": TensorInfo((rows, -(-columns // per_word)), torch.int32),
            "zero_point": TensorInfo((-(-rows // per_word), groups), torch.int32),
            "scale": TensorInfo((rows, groups), self.scale_dtype),
        }
        if self.symmetric:
            del found["zero_point"]
        return {f"{self.name}_{part}": info for part, info in found.items()}

    def read(self, sources: Mapping[str, Source]) -> PackedWeight:
        shape, packed = (sources[f"{self.name}_{part}"].tensor() for part in ("shape", "packed"))
        if not shape.is_meta and tuple(shape.tolist()) != self.shape:
            raise CheckpointError(f"{self.name}_shape says {shape.tolist()}, and the model needs {list(self.shape)}")
        scales = _scales(sources, self.name, torch.float16)
        zeros = None
        if not self.symmetric:
            down = sources[f"{self.name}_zero_point"].tensor().T.contiguous()
            zeros = self._from_words(down, self.shape[0], nibbles=False).T.contiguous()
        values = self._from_words(packed, self.shape[1], nibbles=True)
        return PackedWeight(self.format, self.shape, values, scales, zeros, self.group)

    def write(self, weight: PackedWeight) -> dict[str, Tensor]:
        assert weight.scales is not None
        found = {"packed": self._to_words(weight.values), "scale": weight.scales, "shape": torch.tensor(self.shape)}
        if weight.zeros is not None:
            down = weight.zeros.T.contiguous()  # [K/G, N], a byte each
            if self.format == "int4":
                down = torch.nn.functional.pad(down, (0, down.shape[1] % 2))
                down = join_nibbles(down)
            found["zero_point"] = self._to_words(down).T.contiguous()
        return {f"{self.name}_{part}": tensor for part, tensor in found.items()}

    def config(self) -> dict[str, Any]:
        kind = {"num_bits": BITS[self.format], "type": "int", "symmetric": self.symmetric}
        return {**kind, "strategy": "group", "group_size": self.group}

    def _from_words(self, words: Tensor, count: int, *, nibbles: bool) -> Tensor:
        """int32 [R, W] → bytes [R, count]; with `nibbles`, int4 stays two to a byte as `PackedWeight` holds it."""
        bytes_ = words.contiguous().view(torch.uint8)
        if self.format == "int8":
            return (bytes_[:, :count] ^ 128).view(torch.int8)
        if nibbles:
            return bytes_[:, : count // 2].contiguous()
        return split_nibbles(bytes_)[:, :count]

    def _to_words(self, values: Tensor) -> Tensor:
        """Bytes [R, C], int4 two to a byte → int32 [R, ⌈C/4⌉]."""
        bytes_ = values.view(torch.uint8) ^ 128 if self.format == "int8" else values
        return torch.nn.functional.pad(bytes_, (0, -bytes_.shape[1] % 4)).contiguous().view(torch.int32)


@dataclass(frozen=True)
class StoredFp8:
    """A `StoredPacked` of fp8 with a scale a row."""

    name: str
    shape: tuple[int, int]
    scale_dtype: torch.dtype = torch.float32

    def infos(self) -> dict[str, TensorInfo]:
        scale = TensorInfo((self.shape[0], 1), self.scale_dtype)
        return {f"{self.name}_scale": scale, self.name: TensorInfo(self.shape, FP8)}

    def read(self, sources: Mapping[str, Source]) -> PackedWeight:
        values = sources[self.name].tensor()
        if not values.is_meta and bool((values.view(torch.uint8) & 127 == 127).any()):
            raise CheckpointError(f"{self.name} holds values that are no numbers; download the checkpoint again")
        return PackedWeight("fp8", self.shape, values, _scales(sources, self.name, torch.float32), group=self.shape[1])

    def write(self, weight: PackedWeight) -> dict[str, Tensor]:
        assert weight.scales is not None
        return {f"{self.name}_scale": weight.scales, self.name: weight.values}

    def config(self) -> dict[str, Any]:
        return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}


def _scales(sources: Mapping[str, Source], name: str, dtype: torch.dtype) -> Tensor:
    scales = sources[f"{name}_scale"].tensor().to(dtype)
    if not scales.is_meta and not bool(torch.isfinite(scales).all()):
        raise CheckpointError(f"{name}_scale holds values that are not finite or too large for {dtype}")
    return scales


def stored_as(name: str, weight: PackedWeight) -> StoredPacked:
    """How a weight goes into files, there called `name`."""
    assert weight.scales is not None
    if weight.format == "fp8":
        return StoredFp8(name, weight.shape, weight.scales.dtype)
    return StoredIntegers(name, weight.format, weight.shape, weight.group, weight.zeros is None, weight.scales.dtype)


def side_by_side(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Plain weights [N₁, K], [N₂, K], … of one format and group as one [N₁ + N₂ + …, K]."""
    if len(weights) == 1:
        return weights[0]
    tensors: dict[str, Any] = {
        name: torch.cat([weight.tensors()[name] for weight in weights]) for name in weights[0].tensors()
    }
    rows = sum(weight.shape[0] for weight in weights)
    return replace(weights[0], shape=(rows, weights[0].shape[1]), **tensors)


def find_packed(
    entries: Mapping[str, TensorInfo], rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredPacked]:
    """Our names of the weights that lie packed in the files, and how: of the decoder's linear layers, as `quant.pack`
    packs no others. Only their sizes are read.

    Raises:
        CheckpointError: sizes that no packing of the weight has.
    """
    found: dict[str, StoredPacked] = {}
    for rule in rules:
        name, shape = rule.theirs[0], shapes[rule.ours]
        plain, packed, scale = (entries.get(name + end) for end in ("", "_packed", "_scale"))
        if scale is None or not is_linear(rule.ours, shape):
            continue
        if packed is None and plain is not None and plain.dtype == FP8 and scale.shape == (shape[0], 1):
            found[rule.ours] = StoredFp8(name, (shape[0], shape[1]), scale.dtype)
        if packed is None:
            continue
        if packed.shape[:1] != shape[:1] or len(packed.shape) != 2 or len(scale.shape) != 2:
            raise CheckpointError(f"{name}_packed is {list(packed.shape)}, no packing of {list(shape)}")
        rows, columns = shape
        by_width = {-(-columns * bits // 32): format for format, bits in BITS.items()}
        format, groups = by_width.get(packed.shape[1]), scale.shape[1]
        if format is None or groups < 1 or columns % groups:
            raise CheckpointError(
                f"{name}_packed is {list(packed.shape)} with scales {list(scale.shape)}: neither int8 nor int4 in equal"
                f" groups of {list(shape)}"
            )
        symmetric = f"{name}_zero_point" not in entries
        found[rule.ours] = StoredIntegers(name, format, (rows, columns), columns // groups, symmetric, scale.dtype)
    return found


def is_linear(ours: str, shape: Sequence[int]) -> bool:
    """Whether a parameter of ours is the weight of one of the decoder's linear layers."""
    return ours.startswith("decoder.") and len(shape) == 2 and "embedding" not in ours


def check_config(raw: Mapping[str, Any]) -> None:
    """Whether `quantization_config` is of a kind that is read.

    Raises:
        ConfigError: it is not.
    """
    table = raw.get("quantization_config")
    if table is None:
        return
    if not isinstance(table, Mapping):
        raise ConfigError("quantization_config must be a table")
    method, format = table.get("quant_method"), table.get("format")
    if method == nf4.METHOD:
        return nf4.check_nf4_config(table)
    if method != METHOD or format not in (INTEGER_FORMAT, FP8_FORMAT):
        raise ConfigError(
            f'the weights are quantized as "{method}" (format "{format}"); only {METHOD} with the format'
            f" {INTEGER_FORMAT} or {FP8_FORMAT} and NF4 of {nf4.METHOD} are read, so take another checkpoint, such as"
            " the one it was made from"
        )
    groups = table.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise ConfigError("quantization_config: config_groups must be a table of tables")
    for group in groups.values():
        if group.get("output_activations") is not None:
            raise ConfigError("quantization_config asks for quantized output_activations, which are not computed here")
        asked = group.get("input_activations")
        if asked is not None and format != FP8_FORMAT:
            raise ConfigError(
                "quantization_config asks for quantized input_activations beside whole numbers; only with fp8 weights"
                " are they read"
            )
        if asked is not None and not _is_dynamic_fp8(asked):
            raise ConfigError(
                "quantization_config asks for input_activations other than fp8 with a scale for each token, found as it"
                ' comes ("strategy": "token", "dynamic": true); take an "FP8-dynamic" checkpoint, or quantize your own'
            )
    if len({group.get("input_activations") is None for group in groups.values()}) > 1:
        raise ConfigError("quantization_config asks for fp8 input_activations in some of its groups only, not in all")


def asks_for_fp8_activations(table: Mapping[str, Any]) -> bool:
    """Whether what goes into the fp8 layers is to be rounded too, by a `quantization_config` that `check_config` lets
    pass."""
    groups = table.get("config_groups", {})
    return any(group.get("input_activations") is not None for group in groups.values())


_DYNAMIC_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def _is_dynamic_fp8(asked: Any) -> bool:
    return isinstance(asked, Mapping) and _DYNAMIC_FP8.items() <= {"symmetric": True, **asked}.items()


def quantization_config(
    packed: Sequence[StoredPacked], kept: Iterable[str] = (), *, fp8_activations: bool = False
) -> dict[str, Any]:
    """`quantization_config` for a model whose decoder is packed: its LM head may differ from the rest.

    kept: the names in the files of the decoder's linear layers that are not packed
    """
    kinds: list[tuple[dict[str, Any], set[str]]] = []
    for one in packed:
        decoder = _DECODER if "language_model" in one.name else _DECODER_ALONE
        target = _LM_HEAD if one.name.endswith("lm_head.weight") else decoder
        config = one.config()
        same = next((targets for kind, targets in kinds if kind == config), None)
        if same is None:
            kinds.append((config, {target}))
        else:
            same.add(target)
    layers = (_LAYER.search(name) for name in kept)
    ignored = [*_NEVER_PACKED, *(f"re:.*{re.escape(layer[0])}$" for layer in layers if layer is not None)]
    if not any(_LM_HEAD in targets for _, targets in kinds):
        ignored.append(_LM_HEAD)
    activations = {"input_activations": dict(_DYNAMIC_FP8)} if fp8_activations else {}
    return {
        "quant_method": METHOD,
        "format": FP8_FORMAT if any(isinstance(one, StoredFp8) for one in packed) else INTEGER_FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": sorted(targets), "weights": config, **activations}
            for i, (config, targets) in enumerate(kinds)
        },
        "ignore": ignored,
    }
