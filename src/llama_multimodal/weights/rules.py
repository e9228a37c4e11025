"""Invertible rules between our parameters and the tensors of another layout.

Most layouts differ by names, by reshapes, by a permutation, or by cutting one tensor into several. All of these are
*views*: a rule says which views of our parameter are their tensors. Reading copies their tensors into the views,
writing copies the views out, so the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError

Shape = tuple[int, ...]


class Source(Protocol):
    """One stored tensor."""

    def copy_into(self, out: Tensor) -> None:
        """Copy it into `out`, which has as many elements and may differ in shape, strides, dtype and device."""

    def tensor(self) -> Tensor:
        """It whole, on the CPU, in its own dtype."""


class Rule(Protocol):
    """How one parameter of ours is stored elsewhere."""

    @property
    def ours(self) -> str: ...

    @property
    def theirs(self) -> tuple[str, ...]: ...

    def shapes(self, ours: Shape) -> list[Shape]:
        """The shapes of their tensors for our parameter's shape."""

    def read(self, sources: Sequence[Source], out: Tensor) -> None:
        """Fill our parameter from their tensors."""

    def write(self, ours: Tensor) -> list[Tensor]:
        """Their tensors for our parameter; they may share its memory.

        Raises:
            CheckpointError: their layout cannot hold these values.
        """


def whole(ours: Tensor) -> list[Tensor]:
    return [ours]


@dataclass(frozen=True)
class Rename:
    """`theirs` are `views(ours)`, each reshaped to `shape` where that is given (a shape no single view can have)."""

    ours: str
    theirs: tuple[str, ...]
    views: Callable[[Tensor], list[Tensor]] = whole
    reshaped: bool = False  # their tensor has our shape although its view has another

    def shapes(self, ours: Shape) -> list[Shape]:
        if self.reshaped:
            return [ours]
        return [tuple(view.shape) for view in self.views(torch.empty(ours, device="meta"))]

    def read(self, sources: Sequence[Source], out: Tensor) -> None:
        for source, view in zip(sources, self.views(out), strict=True):
            source.copy_into(view)

    def write(self, ours: Tensor) -> list[Tensor]:
        if self.reshaped:
            return [view.reshape(ours.shape) for view in self.views(ours)]
        return self.views(ours)


def renames(ours: str, theirs: str, names: Mapping[str, str]) -> Iterator[Rule]:
    """One `Rename` a name within a module: ours, theirs."""
    for a, b in names.items():
        yield Rename(f"{ours}.{a}", (f"{theirs}.{b}",))


def split_rows(*sizes: int) -> Callable[[Tensor], list[Tensor]]:
    """Their tensors are our rows, `sizes` of them each."""
    return lambda ours: list(ours.split(sizes))


def reshape(*shape: int) -> Callable[[Tensor], list[Tensor]]:
    """Their tensor is ours in another shape."""
    return lambda ours: [ours.view(shape)]


def interleave(num_heads: int) -> Callable[[Tensor], list[Tensor]]:
    """Rotary pairs lie next to each other in their rows and half a head apart in ours."""
    return lambda ours: [ours.unflatten(0, (num_heads, 2, -1)).transpose(1, 2)]  # [H, D/2, 2, E]


@dataclass(frozen=True)
class TileGrid:
    """A table by aspect-ratio id and tile (ours) against a grid by tile row and column (theirs).

    Ours repeats a grid cell for every ratio that uses it; row 0 (no image) and the tiles a ratio leaves unused are
    zero. Cells that no ratio uses have no place in ours: `unused_cells`.

    ours: [ratios + 1, tiles, …]; theirs: [tiles, tiles, …], or [tiles, tiles, 1, …] with `middle_axis`
    """

    ours: str
    theirs: tuple[str, ...]
    ratios: tuple[tuple[int, int], ...]  # (rows, columns) of ids 1, 2, …
    max_num_tiles: int
    middle_axis: bool

    def shapes(self, ours: Shape) -> list[Shape]:
        middle = (1,) if self.middle_axis else ()
        return [(self.max_num_tiles, self.max_num_tiles, *middle, *ours[2:])]

    def read(self, sources: Sequence[Source], out: Tensor) -> None:
        grid = sources[0].tensor()
        if self.middle_axis:
            grid = grid.flatten(2, 3)
        out.zero_()
        for ratio_id, (rows, columns) in enumerate(self.ratios, start=1):
            out[ratio_id, : rows * columns].copy_(grid[:rows, :columns].flatten(0, 1))

    def write(self, ours: Tensor) -> list[Tensor]:
        grid = ours.new_zeros(self.max_num_tiles, self.max_num_tiles, *ours.shape[2:])
        for ratio_id, (rows, columns) in enumerate(self.ratios, start=1):
            grid[:rows, :columns] = ours[ratio_id, : rows * columns].unflatten(0, (rows, columns))
        again = torch.empty_like(ours)
        written = [grid.unsqueeze(2) if self.middle_axis else grid]
        self.read([Held(written[0])], again)
        if not same_bits(again, ours):
            raise CheckpointError(
                f"{self.ours} differs between aspect ratios, or unused tiles are not zero; Meta's layout holds one"
                " vector for each tile row and column and cannot store this model; keep it in the Hugging Face layout"
            )
        return written

    def unused_cells(self) -> tuple[list[int], list[int]]:
        """Rows and columns of the grid cells that no aspect ratio uses."""
        n = self.max_num_tiles
        cells = [(r, c) for r in range(n) for c in range(n) if (r + 1) * (c + 1) > n]
        return [r for r, _ in cells], [c for _, c in cells]


@dataclass(frozen=True)
class Held:
    """A tensor in memory as a `Source`."""

    value: Tensor

    def copy_into(self, out: Tensor) -> None:
        out.copy_(self.value.reshape(out.shape))

    def tensor(self) -> Tensor:
        return self.value


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, so that NaN equals itself and 0 differs from −0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
