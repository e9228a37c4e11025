"""Pictures as a batch's tiles, in the way that a model's encoder wants them, and how many tokens each becomes.

Shapes: M tiles of all pictures · S side of a tile · H, W of a picture that is not cut
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ..config import ModelConfig, Preprocess, TiledVisionConfig
from ..errors import ImageError
from ..inputs import ImageLayout
from .anyres import anyres_pixels
from .naflex import naflex_pixels
from .preprocess import image_pixels
from .splitting import split_pixels
from .tiles import MEAN, STD, cut_pixels, grid_of, normalise

Placed = tuple[int, Image.Image]
"""The row of the batch that a picture belongs to, and the picture."""


def prepare_pictures(
    pictures: Sequence[Placed], config: ModelConfig, preprocess: Preprocess
) -> tuple[Tensor, list[ImageLayout]]:
    """All pictures of a batch, in their order: tiles [M, 3, S, S] or [M, 3, H, W] float32, and how each was cut.

    Raises:
        ImageError: a picture has no pixels, is too narrow, or comes out in another size than the others.
    """
    if isinstance(config.vision, TiledVisionConfig):
        tiles, layouts = _meta_tiles(pictures, config.vision)
    else:
        tiles, layouts = _cut(pictures, preprocess)
    if config.fusion == "splice" and layouts:
        each = config.num_tokens(*tiles.shape[2:])
        layouts = [replace(layout, num_tokens=_num_tokens(config, layout, each)) for layout in layouts]
    return tiles, layouts


def _num_tokens(config: ModelConfig, layout: ImageLayout, each: int) -> int:
    """Placeholders of a picture, with `each` tokens a tile."""
    return layout.anyres_tokens(round(each**0.5)) if config.grid_pinpoints else each * layout.num_tiles


def _meta_tiles(pictures: Sequence[Placed], vision: TiledVisionConfig) -> tuple[Tensor, list[ImageLayout]]:
    side = vision.image_size
    layouts = [ImageLayout(*grid_of(picture, side, vision.max_num_tiles), row=row) for row, picture in pictures]
    tiles = np.empty((sum(layout.num_tiles for layout in layouts), 3, side, side), np.float32)
    first = 0
    for (_, picture), layout in zip(pictures, layouts):
        end = first + layout.num_tiles
        normalise(cut_pixels(picture, layout.rows, layout.columns, side), out=tiles[first:end])
        first = end
    return torch.from_numpy(tiles), layouts


def _cut(pictures: Sequence[Placed], preprocess: Preprocess) -> tuple[Tensor, list[ImageLayout]]:
    tiles: list[npt.NDArray[np.float32]] = []
    layouts = []
    for row, picture in pictures:
        rows = columns = 1
        if preprocess.layout == "anyres":
            pixels, (rows, columns) = anyres_pixels(picture, preprocess)
        elif preprocess.layout == "split":
            pixels, (rows, columns) = split_pixels(picture, preprocess)
        elif preprocess.layout == "naflex":
            pixels = naflex_pixels(picture, preprocess)[None]
        else:
            pixels = image_pixels(picture, preprocess)[None]
        if tiles and pixels.shape[2:] != tiles[0].shape[2:]:
            sizes = " and ".join(f"{tile.shape[3]} × {tile.shape[2]}" for tile in (tiles[0], pixels))
            raise ImageError(
                f"the pictures of this batch come out in different sizes ({sizes} pixels), as preprocessor_config.json"
                " says; give pictures of one shape, or one picture at a time"
            )
        tiles.append(pixels)
        cut = preprocess.layout in ("anyres", "split")
        layouts.append(ImageLayout(rows, columns, row, whole=cut, size=picture.size))
    return torch.from_numpy(np.concatenate(tiles)) if tiles else torch.empty(0, 3, 0, 0), layouts


def pixels_of(tiles: Tensor, config: ModelConfig, preprocess: Preprocess) -> npt.NDArray[np.uint8]:
    """[M, 3, H, W] as `prepare_pictures` gives them → [M, H, W, 3]: the bytes that they were made of, to look at."""
    values = tiles.double()
    if isinstance(config.vision, TiledVisionConfig):
        scale, mean, std = 1 / 255, MEAN, STD
    else:
        scale = preprocess.rescale_factor or 1.0
        mean, std = preprocess.mean or (0.0,) * 3, preprocess.std or (1.0,) * 3  # type: ignore[assignment]
    values = values * torch.tensor(std).view(3, 1, 1).double() + torch.tensor(mean).view(3, 1, 1).double()
    return (values / scale).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
