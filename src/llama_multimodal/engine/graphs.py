"""Decoding steps of fixed shapes: rows are padded to one of a few numbers, and what a step reads is copied into buffers
that stay where they are. On a CUDA device such a step is captured as a graph once and replayed from then on.

Rows with different adapters share a step that has one at all: each row's choice is a number in a buffer.

A padding row has a key and a value of its own in blocks that no request ever holds. Rows that look at images and rows
that do not share a step: one that does not reads no key, and a gate of its own closes its feed-forward block.

Shapes: B rows of a step, padding among them · M blocks of a row · U units of images of a row · D head dim
"""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..adapters.layers import Joined
from ..adapters.lora import adapter_changes, adapter_in_force, adapter_names, adapter_set, fixed_rows
from ..models import LanguageModel
from ..ops import CacheBlocks, PagedCache, PagedReads
from .config import CachePlan, row_buckets

Row = tuple[Sequence[int], int]
"""The blocks (units) that a row reads, and how many keys."""

_FIRST_WIDTH, _WIDER = 16, 4  # blocks of a row's table; each wider table has so many times as many


class Recorder(Protocol):
    """Turns a step into one that can be run again and again."""

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """step: reads buffers and writes the cache and its result, always the same tensors; it may be run several
        times. Returns what runs it once more."""


class CudaGraphs:
    """Captures steps as CUDA graphs, which share the memory of what they compute in between. One that cannot be
    captured runs as it is, with a warning.

    Other threads go on meanwhile, which may encode pictures: a capture is of its own thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # kernels are compiled and libraries make their handles
                step()
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                out = step()
        except RuntimeError as error:
            torch.cuda.synchronize(self._stream.device)
            why = str(error).partition("\n")[0]
            warnings.warn(f"a decoding step cannot be captured as a CUDA graph and runs as it is: {why}", stacklevel=2)
            return step

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class AsItIs:
    """Runs steps as they are, where there is nothing to capture them with."""

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return step


@dataclass(frozen=True)
class Shape:
    """rows: B. blocks: M. units: U; 0 where no row looks at an image, and gated blocks are passed by. adapters: whether
    a row may have one."""

    rows: int
    blocks: int
    units: int
    adapters: bool


class StaticDecode:
    """One token a row, in steps of as few shapes as will do."""

    def __init__(
        self,
        model: LanguageModel,
        plan: CachePlan,
        caches: tuple[list[CacheBlocks], list[CacheBlocks]],
        images: tuple[list[CacheBlocks], list[CacheBlocks]],
        max_rows: int,
        recorder: Recorder | None = None,
    ) -> None:
        """caches, images: keys and values of every layer. recorder: None goes by the model's device."""
        self._model, self._plan, self._caches, self._images = model, plan, caches, images
        text, device = model.config.text, model.device
        self._recorder = recorder or (CudaGraphs(device) if device.type == "cuda" else AsItIs())
        self._steps: dict[Shape, Callable[[], Tensor]] = {}
        self._joined: dict[str, Joined] = {}  # which recorded steps read: it lives as long as they do
        self._adapter_changes = adapter_changes(model)
        most = -(-text.max_position_embeddings // plan.block_size)
        self._rows = row_buckets(max_rows)
        self._widths = _widths(min(most, plan.num_blocks))
        self._unit_widths = _widths(plan.num_units) if images[0] else ()
        self._frequencies = ops.rope_frequencies(text.head_dim, text.rope_theta, text.rope_scaling).to(device)
        # One buffer of each kind; a shape's own tensors are its beginning.
        rows, angles = max_rows, (1, max_rows, text.head_dim // 2)
        whole = torch.int64
        self._tokens, self._positions = (torch.zeros(1, rows, dtype=whole, device=device) for _ in range(2))
        self._slots = torch.zeros(rows, dtype=whole, device=device)
        self._lengths, self._image_lengths = (torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(2))
        self._table = torch.zeros(rows * self._widths[-1], dtype=torch.int32, device=device)
        self._units = torch.zeros(rows * max((0, *self._unit_widths)), dtype=torch.int32, device=device)
        self._cos, self._sin = (torch.zeros(angles, device=device) for _ in range(2))
        self._sees = torch.zeros(1, rows, 2, dtype=whole, device=device)
        self._adapters = torch.full((1, rows), -1, dtype=whole, device=device)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Record every number of rows with short tables; what is longer is recorded when it first comes."""
        for adapters in (False, True)[: 1 + self._can_choose]:
            for units in (0, *self._unit_widths[:1]):
                for rows in self._rows:
                    self._run(Shape(rows, self._widths[0], units, adapters), [], [], [], [], [], [])

    def forget(self) -> None:
        """What was recorded, as after a change of the weights."""
        self._steps.clear()
        self._joined = {}

    @property
    def _can_choose(self) -> bool:
        return bool(adapter_names(self._model)) and not adapter_set(self._model).merged

    @torch.inference_mode()
    def logits(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        rows: Sequence[Row],
        image_rows: Sequence[Row],
        adapters: Sequence[int],
    ) -> Tensor | None:
        """Store each row's token and return its logits [rows, vocab]; None where no shape is large enough.

        slots: of the cache, where the tokens go. rows, image_rows: what each reads; of images none has a length of 0.
        adapters: into `adapter_names`, -1 for none
        """
        looks = any(length for _, length in image_rows)
        count = _at_least(self._rows, len(tokens))
        blocks = _at_least(self._widths, max(len(row[0]) for row in rows))
        units = _at_least(self._unit_widths, max(len(row[0]) for row in image_rows)) if looks else 0
        if count is None or blocks is None or units is None:
            return None
        shape = Shape(count, blocks, units, self._can_choose and max(adapters) >= 0)
        return self._run(shape, tokens, positions, slots, rows, image_rows, adapters)[: len(tokens)].clone()

    def _run(
        self,
        shape: Shape,
        tokens: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        rows: Sequence[Row],
        image_rows: Sequence[Row],
        adapters: Sequence[int],
    ) -> Tensor:
        plan, pads = self._plan, range(shape.rows - len(tokens))
        scratch = [divmod(pad, plan.block_size) for pad in pads]  # each its own slot behind the requests' blocks
        rows = [*rows, *(([plan.num_blocks + block], slot + 1) for block, slot in scratch)]
        places = [*slots, *((plan.num_blocks + block) * plan.block_size + slot for block, slot in scratch)]
        _put(self._tokens[0], [*tokens, *(0 for _ in pads)])
        _put(self._positions[0], [*positions, *(slot for _, slot in scratch)])
        _put(self._slots, places)
        _put(self._lengths, [length for _, length in rows])
        _put_rows(self._table_of(shape), [blocks for blocks, _ in rows])
        if shape.units:
            image_rows = [*image_rows, *(([], 0) for _ in pads)]
            _put_rows(self._units_of(shape), [units for units, _ in image_rows])
            _put(self._image_lengths, [length for _, length in image_rows])
            self._sees[0, : shape.rows, 1] = self._image_lengths[: shape.rows] > 0
        cos, sin = ops.rope_angles(self._positions[:, : shape.rows], self._frequencies)
        self._cos[:, : shape.rows], self._sin[:, : shape.rows] = cos, sin
        if (changes := adapter_changes(self._model)) != self._adapter_changes:
            self._adapter_changes = changes
            self.forget()
        choice = None
        if shape.adapters:
            _put(self._adapters[0], [*adapters, *(-1 for _ in pads)])
            choice = fixed_rows(self._model, self._adapters[:, : shape.rows], self._joined)
        with adapter_in_force(self._model, choice):
            if shape not in self._steps:
                self._steps[shape] = self._recorder.record(self._step(shape))
            return self._steps[shape]()

    def _table_of(self, shape: Shape) -> Tensor:
        """int32 [B, M]"""
        return self._table[: shape.rows * shape.blocks].view(shape.rows, shape.blocks)

    def _units_of(self, shape: Shape) -> Tensor:
        """int32 [B, U]"""
        return self._units[: shape.rows * shape.units].view(shape.rows, shape.units)

    def _step(self, shape: Shape) -> Callable[[], Tensor]:
        """The computation of a shape, all of whose inputs lie in buffers."""
        rows, decoder = shape.rows, self._model.decoder
        cache = PagedCache(
            *self._caches, PagedReads(self._table_of(shape), self._lengths[:rows], ()), self._slots[:rows]
        )
        images = None
        if shape.units:
            images = PagedCache(*self._images, PagedReads(self._units_of(shape), self._image_lengths[:rows], ()))
        tokens, positions, sees = self._tokens[:, :rows], self._positions[:, :rows], self._sees[:, :rows]
        angles = self._cos[:, :rows], self._sin[:, :rows]

        def step() -> Tensor:
            x = self._model.embed(tokens, None)
            return decoder(x, positions, sees, cross_cache=images, self_cache=cache, angles=angles)[0]

        return step


def _widths(most: int) -> tuple[int, ...]:
    """Of tables for up to `most` blocks."""
    widths = [min(_FIRST_WIDTH, most)]
    while widths[-1] < most:
        widths.append(min(widths[-1] * _WIDER, most))
    return tuple(widths)


def _at_least(sizes: Sequence[int], wanted: int) -> int | None:
    """The first of ascending sizes that is large enough."""
    place = bisect.bisect_left(sizes, wanted)
    return sizes[place] if place < len(sizes) else None


def _put(buffer: Tensor, values: Sequence[int]) -> None:
    buffer[: len(values)].copy_(torch.tensor(values, dtype=buffer.dtype))


def _put_rows(table: Tensor, rows: Sequence[Sequence[int]]) -> None:
    """Each row's blocks at its beginning; what is behind them is not read, and stays as it was."""
    used = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, blocks in zip(used, rows):
        row[: len(blocks)] = blocks
    table[:, : used.shape[1]].copy_(torch.from_numpy(used))
