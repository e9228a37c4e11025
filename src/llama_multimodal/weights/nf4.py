"""NF4 weights in files, as bitsandbytes and transformers have them. In the place of a linear layer's `weight` [N, K]:

    weight                                uint8 [N·K/2, 1]: values two to a byte
    weight.absmax                         uint8 [blocks], or fp32 without double quantization
    weight.quant_map                      fp32 [16], what a value stands for
    weight.nested_absmax                  fp32 [blocks/256]
    weight.nested_quant_map               fp32 [256]
    weight.quant_state.bitsandbytes__nf4  uint8: JSON, with the size of the blocks, N and K, and an offset of the scales

Shapes: N outputs · K inputs
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..quant.nf4 import COMPUTE, NESTED_BLOCK, Nf4Linear, Nf4Weight
from .io import TensorInfo
from .rules import Rename, Rule, Source

METHOD = "bitsandbytes"
_STATE = "quant_state.bitsandbytes__nf4"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_LAYER = re.compile(r"layers\.\d+\..+$")


@dataclass(frozen=True)
class StoredNf4:
    """How one weight [N, K] lies in the files.

    name: of the plain weight there, "….weight". parts: the stored tensors by their full names.
    """

    name: str
    shape: tuple[int, int]
    parts: Mapping[str, TensorInfo]

    def infos(self) -> dict[str, TensorInfo]:
        return dict(self.parts)

    def read(self, sources: Mapping[str, Source]) -> Nf4Weight:
        """From tensors by their names in the files; on the meta device without values.

        Raises:
            CheckpointError: a record that contradicts the tensors.
        """
        values = sources[self.name].tensor()
        found = {part: sources[f"{self.name}.{part}"].tensor() for part in _PARTS if f"{self.name}.{part}" in sources}
        count = self.shape[0] * self.shape[1]
        block, nested_offset = count // max(1, found["absmax"].numel()) or 1, 0.0
        if not values.is_meta:
            block, nested_offset = self._state(sources[f"{self.name}.{_STATE}"].tensor(), "nested_absmax" in found)
        offset = torch.tensor(nested_offset, device=values.device) if "nested_absmax" in found else None
        if found["absmax"].numel() != -(-count // block):
            raise CheckpointError(f"{self.name}.absmax has {found['absmax'].numel()} scales for blocks of {block}")
        return Nf4Weight(
            self.shape, block, values.view(-1, 1), found["absmax"], found["quant_map"], found.get("nested_absmax"),
            found.get("nested_quant_map"), offset,
        )  # fmt: skip

    def _state(self, raw: Tensor, nested: bool) -> tuple[int, float]:
        """The size of the blocks, and the offset of the scales; 0 where they are not nested."""
        try:
            state = json.loads(bytes(raw.tolist()))
            block, offset = int(state["blocksize"]), float(state["nested_offset"]) if nested else 0.0
            wrong = list(state["shape"]) != list(self.shape) or state["quant_type"] != "nf4" or block < 1
            wrong |= nested and state["nested_blocksize"] != NESTED_BLOCK
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.name}.{_STATE} is damaged; download the checkpoint again") from error
        if wrong:
            raise CheckpointError(f"{self.name}.{_STATE} is of another weight, or not of NF4: {str(state)[:200]}")
        return block, offset

    def write(self, layer: Nf4Linear) -> dict[str, Tensor]:
        """The stored tensors of a layer."""
        return tensors_of(self.name, layer)


def tensors_of(name: str, layer: Nf4Linear) -> dict[str, Tensor]:
    """What files have of a layer, there called `name`."""
    weight = layer.weight
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": weight.block_size, "dtype": "bfloat16"}
    state["shape"] = list(weight.shape)
    found = {"absmax": weight.scales, "quant_map": weight.code}
    if weight.nested_scales is not None:
        assert weight.nested_code is not None and weight.nested_offset is not None
        found |= {"nested_absmax": weight.nested_scales, "nested_quant_map": weight.nested_code}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        state["nested_offset"] = float(weight.nested_offset)
    record = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {name: weight.values, **{f"{name}.{part}": tensor for part, tensor in {**found, _STATE: record}.items()}}


def stored_nf4(name: str, layer: Nf4Linear) -> StoredNf4:
    """How a layer's weight goes into files, there called `name`."""
    infos = {part: TensorInfo(tuple(tensor.shape), tensor.dtype) for part, tensor in tensors_of(name, layer).items()}
    return StoredNf4(name, layer.weight.shape, infos)


def find_nf4(
    entries: Mapping[str, TensorInfo], rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredNf4]:
    """Our names of the weights that are NF4 in the files. Only their sizes are read.

    Raises:
        CheckpointError: sizes that no NF4 weight has.
    """
    found: dict[str, StoredNf4] = {}
    for rule in rules:
        name, shape = rule.theirs[0], shapes[rule.ours]
        if f"{name}.{_STATE}" not in entries or not isinstance(rule, Rename):
            continue
        ends = ("", *(f".{part}" for part in (*_PARTS, _STATE)))
        parts = {name + end: entries[name + end] for end in ends if name + end in entries}
        whole = len(shape) == 2 and name in parts and {f"{name}.absmax", f"{name}.quant_map"} <= parts.keys()
        if not whole or parts[name].dtype != torch.uint8 or 2 * parts[name].num_bytes != shape[0] * shape[1]:
            raise CheckpointError(f"{name} and what lies beside it are no NF4 weight of {list(shape)}")
        found[rule.ours] = StoredNf4(name, (shape[0], shape[1]), parts)
    return found


def check_nf4_config(table: Mapping[str, Any]) -> None:
    """Whether bitsandbytes' `quantization_config` is of a kind that is read.

    Raises:
        ConfigError: it is not.
    """
    if not table.get("load_in_4bit") or table.get("bnb_4bit_quant_type") != "nf4":
        raise ConfigError(
            "the weights are quantized by bitsandbytes in another format than NF4 (8 bits or FP4), which is not read;"
            " take another checkpoint, such as the one it was made from"
        )


def compute_dtype(table: Mapping[str, Any]) -> torch.dtype:
    """In which products run."""
    return COMPUTE.get(str(table.get("bnb_4bit_compute_dtype")).removeprefix("torch."), torch.bfloat16)


def nf4_config(layers: Iterable[Nf4Linear], kept: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` for others. kept: names in the files of linear layers that are not NF4."""
    layers = list(layers)
    names = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
    skipped = {"lm_head", "multi_modal_projector"}
    for name in kept:
        if match := _LAYER.search(name.removesuffix(".weight")):
            skipped.add(match[0])
    return {
        "quant_method": METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": any(layer.weight.nested_scales is not None for layer in layers),
        "bnb_4bit_compute_dtype": names[layers[0].compute_dtype],
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(skipped),
    }
