"""Pack a model by GPTQ, block by block, on inputs that it really has.

The calibration rows pass through the blocks in step: each block sees what the packed blocks before it put out, its
layers' inputs are summed up, its layers are packed, and the rows go on through the packed block. In memory are the
model, what the rows are between two blocks, and the input squares [K, K] of one block's layers.

Shapes: T tokens of a row · E hidden size · K inputs of a layer · S vision tokens of a row
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..inputs import ModelInputs
from ..models import LanguageModel
from ..models.layers import PackedLinear
from ..models.llama import CrossAttentionBlock, SelfAttentionBlock
from ..ops import INTEGERS
from .gptq import InputSquares, gptq
from .pack import LM_HEAD, Packing, layers_to_pack, pack_layer, plain_weight, put_packed

Progress = Callable[[int, int], None]


@dataclass
class _Row:
    """One calibration row on its way.

    x: [1, T, E], what the next block reads. calls: kind of block → what it is called with besides; gated blocks are
    not in it where the row has no image, and are passed by. features: [S, E], what the gated blocks project.
    """

    x: Tensor
    calls: dict[type[nn.Module], tuple[Any, ...]] = field(default_factory=dict)
    features: Tensor | None = None

    @torch.no_grad()
    def through(self, block: nn.Module) -> Tensor:
        """What the block puts out."""
        if type(block) not in self.calls:
            return self.x
        if isinstance(block, CrossAttentionBlock):
            assert self.features is not None
            return block(self.x, *block.attention.project(self.features), *self.calls[CrossAttentionBlock])
        return block(self.x, *self.calls[type(block)])


def pack_calibrated(
    model: LanguageModel, packing: Packing, rows: Iterable[ModelInputs], progress: Progress | None = None
) -> LanguageModel:
    """`quant.pack.pack` by GPTQ: in place, with the layers that `packing` names as int8 or int4; returns the model.

    rows: batches of one row each, so that nothing is padding; a few hundred
    progress: called with blocks done and blocks in all

    Raises:
        ConfigError: as `pack` does; or a format without a grid, no rows, or inputs that are not finite.
    """
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ConfigError("the model's weights are packed already; load it again to pack it otherwise")
    if packing.format not in INTEGERS:
        raise ConfigError(f"GPTQ rounds to {' or '.join(INTEGERS)}, not to {packing.format}; leave the method out")
    chosen = layers_to_pack(model, packing)
    blocks = model.decoder.layers
    under_way = [_record(model, inputs) for inputs in rows]
    if not under_way:
        raise ConfigError("GPTQ needs calibration rows, and there are none")
    for index, block in enumerate(blocks):
        within = [path for path in chosen if path.startswith(f"decoder.layers.{index}.")]
        with _summing(model, within) as squares:
            for row in under_way:
                row.through(block)
        _pack(model, within, packing, squares)
        for row in under_way:
            row.x = row.through(block)
        if progress is not None:
            progress(index + 1, len(blocks))
    if LM_HEAD in chosen:
        head = InputSquares(model.config.text.hidden_size, model.device)
        for row in under_way:
            with torch.no_grad():
                head.add(model.decoder.norm(row.x))
        _pack(model, [LM_HEAD], packing, {LM_HEAD: head})
    return model


class _SeenEnough(Exception):
    """Ends a run of the model once it has shown how each kind of block is called."""


@torch.no_grad()
def _record(model: LanguageModel, inputs: ModelInputs) -> _Row:
    """Run a row as far as needed to know what the first block reads, and how every kind of block is called."""
    if inputs.num_rows != 1:
        raise ValueError(f"calibration takes one row at a time, not {inputs.num_rows}")
    blocks = list(model.decoder.layers)
    gated = [block for block in blocks if isinstance(block, CrossAttentionBlock)] if inputs.images else []
    kinds = {SelfAttentionBlock, *(type(block) for block in gated)}
    seen: list[_Row] = []
    features: list[Tensor] = []

    def called(block: nn.Module, given: tuple[Any, ...]) -> None:
        if not seen:
            seen.append(_Row(given[0]))
        seen[0].calls.setdefault(type(block), given[3:] if isinstance(block, CrossAttentionBlock) else given[1:])
        if seen[0].calls.keys() == kinds:
            raise _SeenEnough

    handles = [block.register_forward_pre_hook(called) for block in blocks]
    for block in gated[:1]:
        handles.append(block.attention.kv.register_forward_pre_hook(lambda _, given: features.append(given[0])))
    try:
        model(inputs, last_token_of=[0])
    except _SeenEnough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    seen[0].features = features[0] if features else None
    return seen[0]


@contextmanager
def _summing(model: LanguageModel, paths: list[str]) -> Iterator[dict[str, InputSquares]]:
    """The input squares of these layers, of all that passes through them inside."""
    squares = {path: InputSquares(plain_weight(model, path).shape[1], model.device) for path in paths}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, given, sums=sums: sums.add(given[0]))
        for path, sums in squares.items()
    ]
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()


def _pack(model: LanguageModel, paths: list[str], packing: Packing, squares: dict[str, InputSquares]) -> None:
    for path in paths:
        format = packing.format_of(path)
        if format not in INTEGERS:
            pack_layer(model, path, packing)
            continue
        try:
            weight = gptq(
                plain_weight(model, path), squares.pop(path).mean, format,
                group=packing.group, symmetric=packing.symmetric,
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"{error} ({path}); use other calibration rows, or round without a method") from error
        put_packed(model, path, weight)
