"""Auxiliary supervision: what each patch shows, how many of each thing there are, where a named thing is.

Answers alone teach a vision encoder slowly: a count is one number for a whole picture. The renderer knows where
everything is, so small linear heads, thrown away after training, ask the encoder's final state for it directly. And
whether one thing is left of another takes two places and a comparison, which an answer of one bit hardly teaches at
once: the decoder's state half way up, at the words that name a thing, is asked for the thing's place; and while it
spells a printed word, for the place of the character that comes next.

Shapes: M tiles of the batch · P² patches of a tile · N pictures · K things named · E text hidden size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import ModelConfig, TiledVisionConfig
from ...inputs import ImageLayout
from ...models import VisionLanguageModel
from ...zoo.world import CHARS, COLORS, SHAPES, Mark, count_matching

# Classes of each patch head; class 0 is "nothing of the kind covers this patch", for "center" that none has it here.
PATCH_HEADS = {
    "center": 2,
    "shape": len(SHAPES) + 1,
    "color": len(COLORS) + 1,
    "size": 3,
    "char": len(CHARS) + 1,
    "index": 9,
    "value": 11,
    "same": 10,  # how many things there are of this shape and colour, 1 to 9; of this colour; of this shape
    "same_color": 10,
    "same_shape": 10,
}
_NUMBERS = ("index", "value", "same", "same_color", "same_shape")  # heads that ask about the picture as a whole
_NOTHING_WEIGHT = 0.1  # most patches show nothing
_PLACE_WEIGHT = 3.0
_MOST = 10  # counts 0 … 9
_COUNTS = 1 + len(COLORS) + len(SHAPES)
_UNKNOWN = -100


@dataclass(frozen=True)
class Targets:
    """patches: int64 [heads, M, P²]; counts: int64 [N, 1 + colours + shapes], -100 for pictures without objects.

    mentions: int64 [K, 2], batch row and position of the last token that names a thing, or of the token before a
    printed character; places: fp32 [K, 2], the thing's x and y on its canvas, in tiles.
    """

    patches: Tensor
    counts: Tensor
    mentions: Tensor
    places: Tensor

    def weights(self) -> Tensor:
        """What each loss term is a mean over: fp64 [heads + 2], weighted patches, counts and things named."""
        shown = (self.patches > 0).sum((1, 2)) + _NOTHING_WEIGHT * (self.patches == 0).sum((1, 2))
        others = torch.stack(((self.counts != _UNKNOWN).sum(), torch.tensor(len(self.mentions))))
        return torch.cat((shown, others)).double()


def picture_targets(
    marks: Sequence[Mark], layout: ImageLayout, vision: TiledVisionConfig, *, counted: bool = True
) -> tuple[Tensor, Tensor]:
    """One picture's targets: patches [heads, tiles, P²] and counts [1 + colours + shapes].

    marks: in pixels of the canvas. counted: whether numbers are asked for; on a sheet they are not, but for the places
    of a word's characters.
    """
    side = vision.image_size // vision.patch_size
    rows, columns = layout.rows * side, layout.columns * side
    canvas = torch.zeros(len(PATCH_HEADS), rows, columns, dtype=torch.int64)
    counts = torch.zeros(_COUNTS, dtype=torch.int64)
    pixels = 1 / vision.patch_size  # patches a canvas pixel
    for mark in marks:
        here = _covered(mark, pixels, rows, columns)
        values = [mark.shape, mark.color, mark.size, mark.char, mark.index, mark.value - 1 if mark.value > 0 else -1]
        if mark.kind == "object" and counted:
            values += [count_matching(marks, *of) - 1 for of in _kinds_of(mark)]
        for head, value in enumerate(values, start=1):
            if value >= 0:
                canvas[head, here] = value + 1
        if mark.kind == "object" and mark.size < 0:  # neither clearly small nor clearly big
            canvas[list(PATCH_HEADS).index("size"), here] = _UNKNOWN
        canvas[0, *_patch_of(mark, pixels, rows, columns)] = 1
        if mark.kind == "object":
            counts[0] += 1
            counts[1 + mark.color] += 1
            counts[1 + len(COLORS) + mark.shape] += 1
    if not counted:
        numbers = [head for head, name in enumerate(PATCH_HEADS) if name in _NUMBERS]
        canvas[numbers] = canvas[numbers].masked_fill(canvas[numbers] == 0, _UNKNOWN)
    if not counted or not any(mark.kind == "object" for mark in marks):
        counts.fill_(_UNKNOWN)
    patches = canvas.view(-1, layout.rows, side, layout.columns, side).transpose(2, 3)
    return patches.reshape(len(PATCH_HEADS), layout.num_tiles, side * side), counts


def _kinds_of(mark: Mark) -> tuple[tuple[int, int], ...]:
    """What is counted for an object: (shape, colour) of both, of its colour, of its shape; -1 for any."""
    return (mark.shape, mark.color), (-1, mark.color), (mark.shape, -1)


def _patch_of(mark: Mark, pixels: float, rows: int, columns: int) -> tuple[int, int]:
    """Row and column of the patch with the mark's centre; pixels: patches a canvas pixel."""
    return min(max(int(mark.y * pixels), 0), rows - 1), min(max(int(mark.x * pixels), 0), columns - 1)


def _covered(mark: Mark, pixels: float, rows: int, columns: int) -> Tensor:
    """Which patches have their middle within the mark (an object: within its circle): bool [rows, columns]."""
    left, top, right, bottom = (edge * pixels for edge in mark.box)
    y, x = (torch.arange(rows) + 0.5)[:, None], (torch.arange(columns) + 0.5)[None]
    if mark.kind == "object":
        radius = (right - left) / 2
        inside = (x - (left + right) / 2) ** 2 + (y - (top + bottom) / 2) ** 2 <= radius**2
    else:
        inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
    inside[_patch_of(mark, pixels, rows, columns)] = True
    return inside


class AuxiliaryHeads(nn.Module):
    """Linear read-outs of the encoder's final state and of the decoder's state half way up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.size = config.tiled.hidden_size
        self.norm = nn.LayerNorm(self.size)
        self.patch = nn.Linear(self.size, sum(PATCH_HEADS.values()))
        self.count = nn.Linear(self.size, _COUNTS * _MOST)
        self.place = nn.Sequential(nn.LayerNorm(config.text.hidden_size), nn.Linear(config.text.hidden_size, 2))

    def forward(
        self, features: Tensor, images: Sequence[ImageLayout], targets: Targets, totals: Sequence[float]
    ) -> Tensor:
        """The encoder's part of the step's loss, scalar; features [M, tokens, output_size] of the encoder.

        totals: `Targets.weights` summed over the whole step, so that its micro-batches add up to its mean.
        """
        state = self.norm(features[..., : self.size])
        loss = features.new_zeros(())
        logits = self.patch(state[:, 1:]).split(list(PATCH_HEADS.values()), dim=-1)
        for head, target, total in zip(logits, targets.patches, totals):
            weight = torch.ones(head.shape[-1]).index_fill(0, torch.tensor(0), _NOTHING_WEIGHT)
            summed = F.cross_entropy(head.flatten(0, 1), target.flatten(), weight, reduction="sum")
            loss = loss + summed / max(total, 1.0)
        pooled = torch.stack([part[:, 0].mean(0) for part in state.split([i.num_tiles for i in images])])
        counted = self.count(pooled).unflatten(-1, (_COUNTS, _MOST))
        summed = F.cross_entropy(counted.flatten(0, 1), targets.counts.flatten(), reduction="sum")
        return loss + 2.0 * summed / max(totals[-2], 1.0)

    def places(self, state: Tensor, targets: Targets, totals: Sequence[float]) -> Tensor:
        """The decoder's part, scalar; state [B, T, E] of `middle_block`."""
        rows, positions = targets.mentions.unbind(1)
        found = self.place(state[rows, positions])
        summed = F.smooth_l1_loss(found, targets.places, reduction="sum", beta=0.1)
        return _PLACE_WEIGHT * summed / max(totals[-1], 1.0)


def middle_block(model: VisionLanguageModel) -> nn.Module:
    """The gated block whose state is asked for places; the blocks after it are left to compare them."""
    gated = model.config.text.cross_attention_layers
    return model.decoder.layers[gated[len(gated) // 2]]
