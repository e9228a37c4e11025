"""Idefics3 and SmolVLM: a picture at one large size, cut into squares, and the whole of it in one square after them.

Bit for bit what transformers 5.23 makes of the pixels (`Idefics3ImageProcessorPil`, `SmolVLMImageProcessorPil`) and of
the prompt (`Idefics3Processor`, `SmolVLMProcessor`).

Shapes: S side of a square in pixels · n = rows · columns + 1, or 1 where the grid is (0, 0)
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..config import Preprocess
from ..config.checks import require
from .preprocess import check_picture, normalise, resized

MAX_EDGE = 4096  # however long an edge is asked for

IMAGE_TOKEN = "<image>"
BORDER_TOKEN = "<fake_token_around_image>"
GLOBAL_TOKEN = "<global-img>"


def grid_of(image: Image.Image, preprocess: Preprocess) -> tuple[int, int]:
    """(rows, columns) of the squares of a picture, for layout "split"; (0, 0) where it is one square.

    Raises:
        ImageError: the picture has no pixels.
    """
    require(preprocess.layout == "split", "layout must be split", preprocess)
    check_picture(image)
    if not preprocess.split:
        return 0, 0
    width, height = image.size
    side = preprocess.tile_size or 1
    if preprocess.longest_edge is not None:
        height, width = longest_edge_size(width, height, preprocess.longest_edge)
    rows, columns = _whole_squares(width, height, side)
    return (0, 0) if rows == columns == 1 else (rows, columns)


def split_pixels(image: Image.Image, preprocess: Preprocess) -> tuple[npt.NDArray[np.float32], tuple[int, int]]:
    """An RGB picture as normalised pixels [n, 3, S, S] float32, and its grid (rows, columns), for layout "split".

    The squares row by row, and after them the whole picture. It is resized up to three times, each from the one before.

    Raises:
        ImageError: the picture has no pixels, or is so narrow that it would become too large.
    """
    rows, columns = grid_of(image, preprocess)
    side = preprocess.tile_size or 1
    if preprocess.longest_edge is not None:
        height, width = longest_edge_size(*image.size, preprocess.longest_edge)
        image = resized(image, height, width, preprocess.resample)
    pixels = np.empty((rows * columns + 1, 3, side, side), np.float32)
    if rows:
        image = resized(image, rows * side, columns * side, preprocess.resample)
        grid = np.asarray(image).reshape(rows, side, columns, side, 3)
        normalise(grid.swapaxes(1, 2).reshape(-1, side, side, 3), preprocess, out=pixels[:-1])
    whole = np.asarray(resized(image, side, side, preprocess.resample))
    normalise(whole[None], preprocess, out=pixels[-1:])
    return pixels, (rows, columns)


def longest_edge_size(width: int, height: int, edge: int) -> tuple[int, int]:
    """(height, width) with `edge` as the longer side, the ratio kept, the shorter side even or 1."""
    ratio = width / height
    if width >= height:
        width, height = edge, int(edge / ratio)
        height += height % 2
    else:
        width, height = int(edge * ratio), edge
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    if max(width, height) > MAX_EDGE:
        ratio = width / height
        width, height = (MAX_EDGE, int(MAX_EDGE / ratio)) if width >= height else (int(MAX_EDGE * ratio), MAX_EDGE)
    return max(height, 1), max(width, 1)


def _whole_squares(width: int, height: int, side: int) -> tuple[int, int]:
    """(rows, columns) of squares: the longer side rounded up to whole ones, then the shorter side in that ratio."""
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / side)
        return math.ceil(int(columns * side / ratio) / side), columns
    rows = math.ceil(height / side)
    return rows, math.ceil(int(rows * side * ratio) / side)


def image_prompt(rows: int, columns: int, image_seq_len: int) -> str:
    """The text that stands for one picture, with `image_seq_len` image tokens for each of its squares."""
    image = IMAGE_TOKEN * image_seq_len
    whole = f"{BORDER_TOKEN}{GLOBAL_TOKEN}{image}{BORDER_TOKEN}"
    if rows == columns == 0:
        return whole
    lines = (
        "".join(f"{BORDER_TOKEN}<row_{row}_col_{column}>{image}" for column in range(1, columns + 1))
        for row in range(1, rows + 1)
    )
    return "\n".join([*lines, "", whole])
