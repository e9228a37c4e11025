"""LLaVA-NeXT: a picture on the canvas that wastes least, cut into crops, and the whole picture before them.

Bit for bit what transformers 5.23 makes of the pixels (`LlavaNextImageProcessorPil`). The number of tokens is in
`inputs.ImageLayout` and `pictures.py`.

Shapes: S side of a crop in pixels · rows, columns of the grid of crops · n = 1 + rows · columns
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..config import Preprocess
from ..config.checks import require
from .preprocess import check_picture, normalise, resized


def choose_canvas(width: int, height: int, grid_pinpoints: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) of `grid_pinpoints` on which most of the picture's pixels survive, then with least waste.

    Enlarging earns nothing: a picture never counts for more pixels than it has. The first of equals wins.
    """

    def merit(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(grid_pinpoints, key=merit)


def grid_of(image: Image.Image, preprocess: Preprocess) -> tuple[int, int]:
    """(rows, columns) of the crops of a picture, for layout "anyres".

    Raises:
        ImageError: the picture has no pixels.
    """
    require(preprocess.layout == "anyres", "layout must be anyres", preprocess)
    check_picture(image)
    height, width = choose_canvas(*image.size, preprocess.grid_pinpoints)
    side = preprocess.tile_size or 1
    return height // side, width // side


def anyres_pixels(image: Image.Image, preprocess: Preprocess) -> tuple[npt.NDArray[np.float32], tuple[int, int]]:
    """An RGB picture as normalised pixels [n, 3, S, S] float32, and its grid (rows, columns), for layout "anyres".

    First the whole picture, squeezed into a square; then the crops row by row, of the picture with its ratio kept in
    the middle of a black canvas.

    Raises:
        ImageError: the picture has no pixels, or is so narrow that it would become too large.
    """
    rows, columns = grid_of(image, preprocess)
    side = preprocess.tile_size or 1
    height, width = fitted_size(*image.size, rows * side, columns * side)
    top, left = (rows * side - height) // 2, (columns * side - width) // 2
    canvas = np.zeros((rows * side, columns * side, 3), np.uint8)
    canvas[top : top + height, left : left + width] = np.asarray(resized(image, height, width, preprocess.resample))
    crops = canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    whole = np.asarray(resized(image, side, side, preprocess.resample))
    pixels = np.empty((1 + rows * columns, 3, side, side), np.float32)
    normalise(whole[None], preprocess, out=pixels[:1])
    normalise(crops, preprocess, out=pixels[1:])
    return pixels, (rows, columns)


def fitted_size(width: int, height: int, canvas_height: int, canvas_width: int) -> tuple[int, int]:
    """(height, width) of the picture that touches two sides of the canvas, rounded up."""
    scale_width, scale_height = canvas_width / width, canvas_height / height
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), canvas_height), canvas_width
    return canvas_height, min(math.ceil(width * scale_height), canvas_width)
