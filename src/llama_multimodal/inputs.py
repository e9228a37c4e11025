"""What a model reads: tokens, and the tiles of every image packed one after the other.

Shapes: B rows · T tokens · N images in the batch · M real tiles in the batch · S side of a tile in pixels
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .errors import PromptError


class TextDecoder(Protocol):
    """Turns tokens into text as they come; holds back bytes that do not make a whole character yet."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True)
class ImageLayout:
    """How one image was cut: its tiles lie row by row in `ModelInputs.tiles`."""

    rows: int
    columns: int
    row: int = 0  # the batch row it belongs to
    whole: bool = False  # a tile of the whole picture besides, before the others or after them
    num_tokens: int = 1  # placeholder tokens in its row
    size: tuple[int, int] = (1, 1)  # the picture's (width, height), of which LLaVA-NeXT needs the ratio
    # (height, width) of the corner of its tiles that it fills, where the batch has larger ones; None: all of them
    pixels: tuple[int, int] | None = None

    @property
    def num_tiles(self) -> int:
        return self.rows * self.columns + self.whole

    def unpadded_patches(self, side: int) -> tuple[slice, slice]:
        """Which rows and columns of the grid's rows · side × columns · side patches show the picture rather than its
        padding (LLaVA-NeXT).

        Worked out in patches, not in pixels, with as much cut off on either side: a patch of padding may stay. Nothing
        may be left of a very narrow picture.
        """
        (width, height), grid_height, grid_width = self.size, self.rows * side, self.columns * side
        top = left = 0
        # Rounded before it is cut: a product a hair below a whole number counts as that number.
        if width / height > grid_width / grid_height:
            top = (grid_height - int(round(height * (grid_width / width), 7))) // 2
        else:
            left = (grid_width - int(round(width * (grid_height / height), 7))) // 2
        return slice(top, grid_height - top), slice(left, grid_width - left)

    def anyres_tokens(self, side: int) -> int:
        """LLaVA-NeXT's tokens: side² of the whole picture, then its unpadded patches and a newline behind each row."""
        rows, columns = self.unpadded_patches(side)
        return side**2 + (rows.stop - rows.start) * (columns.stop - columns.start + 1)


@dataclass(frozen=True)
class ModelInputs:
    """One batch. Rows are padded on the right; images are ordered by row, then by place in the row.

    `visible[b, t] = (first, end)` is the range of images *of row b* that token t may see; `first == end` is none.
    It stays on the CPU: loops over it must not wait for a device.
    """

    tokens: Tensor  # [B, T] int64
    positions: Tensor  # [B, T] int64
    lengths: tuple[int, ...]  # real tokens in each row
    tiles: Tensor  # [M, 3, S, S], normalised pixels; M = 0 for text only
    images: tuple[ImageLayout, ...]  # N
    visible: Tensor  # [B, T, 2] int64, on the CPU
    decoder: Callable[[], TextDecoder] | None = None  # makes one for each answer; None without a tokenizer
    segments: Tensor | None = (
        None  # [B, T] int64, on the CPU: tokens of a row read their own segment only; None: a row is one
    )

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0]

    def images_per_row(self) -> list[int]:
        counts = [0] * self.num_rows
        for image in self.images:
            counts[image.row] += 1
        return counts

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ModelInputs:
        """Move to a device; `dtype` applies to the tiles."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            positions=self.positions.to(device),
            tiles=self.tiles.to(device=device, dtype=dtype),
            segments=None if self.segments is None else self.segments.to(device),
        )


def visible_images(tokens: Sequence[int], image_token_id: int | None) -> list[tuple[int, int]]:
    """The range of images each token may see (Meta's `create_vision_mask`).

    An image is seen from its own token to the next image's token; consecutive images share the later one's end.
    So a token sees the latest run of adjacent image tokens, as far as that run has come.
    """
    visible, first, count = [], 0, 0
    previous_was_image = False
    for token in tokens:
        is_image = token == image_token_id
        if is_image:
            if not previous_was_image:
                first = count
            count += 1
        visible.append((first, count))
        previous_was_image = is_image
    return visible


def join_tiles(groups: Sequence[tuple[Tensor, Sequence[ImageLayout]]]) -> tuple[Tensor, list[ImageLayout]]:
    """Tiles of several pictures or batches, each [M, 3, H, W], one after the other, and the layouts of all.

    Where they come in different sizes, H and W are the largest, and each fills a corner of its own.
    """
    layouts = [image for _, images in groups for image in images]
    filled = [(tiles, images) for tiles, images in groups if len(tiles)]
    if not filled:
        return torch.empty(0, 3, 0, 0) if not groups else groups[0][0], layouts
    height, width = (max(tiles.shape[axis] for tiles, _ in filled) for axis in (2, 3))
    if all(tiles.shape[2:] == (height, width) for tiles, _ in filled):
        return torch.cat([tiles for tiles, _ in filled]), layouts
    room = filled[0][0].new_zeros(sum(len(tiles) for tiles, _ in filled), 3, height, width)
    for corner, (tiles, _) in zip(room.split([len(tiles) for tiles, _ in filled]), filled):
        corner[:, :, : tiles.shape[2], : tiles.shape[3]] = tiles
    return room, [
        replace(image, pixels=image.pixels or (tiles.shape[2], tiles.shape[3]))
        for tiles, images in filled
        for image in images
    ]


def batch_inputs(
    rows: Sequence[Sequence[int]],
    tiles: Tensor,
    images: Sequence[ImageLayout],
    *,
    image_token_id: int | None,
    pad_token_id: int,
    spliced: bool = False,
    decoder: Callable[[], TextDecoder] | None = None,
) -> ModelInputs:
    """Pad token rows into one batch and work out what each token may see.

    image_token_id: None where no token stands for an image
    spliced: the images take their tokens' places, and no token looks at one

    Raises:
        PromptError: an empty row, or a row whose image tokens and images differ in number.
    """
    given = [0] * len(rows)
    for image in images:
        given[image.row] += image.num_tokens
    width = max((len(row) for row in rows), default=0)
    tokens = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    visible = torch.zeros(len(rows), width, 2, dtype=torch.int64)
    for b, row in enumerate(rows):
        if len(row) == 0:
            raise PromptError(f"row {b} has no tokens; a prompt needs at least one")
        placeholders = sum(token == image_token_id for token in row)
        if placeholders != given[b]:
            number = sum(image.row == b for image in images)
            became = f" of {given[b]} tokens" if given[b] != number else ""
            raise PromptError(
                f"row {b} has {placeholders} image placeholders (token {image_token_id}) but {number} images{became}"
                " were given; give one image for each placeholder"
            )
        tokens[b, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
        if not spliced:
            visible[b, : len(row)] = torch.tensor(visible_images(row, image_token_id))
    positions = torch.arange(width).expand(len(rows), width).contiguous()
    return ModelInputs(tokens, positions, tuple(len(row) for row in rows), tiles, tuple(images), visible, decoder)
