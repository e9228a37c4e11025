"""Cut a picture into tiles, bit for bit as Meta's `image_transform.VariableSizeImageTransform` does.

Shapes: n tiles of one picture, in row-major order · S side of a tile in pixels
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import ImageError

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, per channel of pixels in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)


def choose_canvas(width: int, height: int, image_size: int, max_num_tiles: int) -> tuple[int, int]:
    """The grid (rows, columns) of tiles for a picture of `width` × `height` pixels.

    The smallest upscale of at least 1, else the largest downscale; of several such grids the one with the fewest
    tiles. The comparison is made in float32, as in the reference: some ties exist only there.
    """
    grids = np.array(_grids(max_num_tiles), dtype=np.int64)  # [G, 2] rows, columns
    sides = (grids * image_size).astype(np.float32)
    scales = np.minimum(sides[:, 1] / np.float32(width), sides[:, 0] / np.float32(height))
    upscales = scales[scales >= 1]
    scale = upscales.min() if len(upscales) else scales.max()
    chosen = grids[scales == scale]
    rows, columns = chosen[chosen.prod(axis=1).argmin()]
    return int(rows), int(columns)


def _grids(max_num_tiles: int) -> list[tuple[int, int]]:
    """Every grid of at most `max_num_tiles` tiles in the reference's order (it settles ties): by ratio, large first."""
    by_ratio: dict[float, list[tuple[int, int]]] = {}
    for tiles in range(max_num_tiles, 0, -1):
        for columns in (n for n in range(1, tiles + 1) if tiles % n == 0):
            rows = tiles // columns
            by_ratio.setdefault(columns / rows, []).append((rows, columns))
    return [grid for grids in by_ratio.values() for grid in grids]


def fitted_size(width: int, height: int, rows: int, columns: int, image_size: int) -> tuple[int, int]:
    """(width, height) of the picture once resized into the grid: its ratio kept, enlarged to one tile at most.

    Raises:
        ImageError: the picture is so narrow that a side would shrink to nothing (the reference fails there too).
    """
    # A side shorter than a tile may grow to a tile, no further.
    target_width = min(max(width, image_size), columns * image_size)
    target_height = min(max(height, image_size), rows * image_size)
    scale_width, scale_height = target_width / width, target_height / height
    if scale_width < scale_height:
        new_width, new_height = target_width, min(math.floor(height * scale_width), target_height)
    else:
        new_width, new_height = min(math.floor(width * scale_height), target_width), target_height
    if new_width < 1 or new_height < 1:
        raise ImageError(
            f"an image of {width} x {height} pixels is too narrow: it would shrink to {new_width} x {new_height};"
            " crop it to a less extreme shape"
        )
    return new_width, new_height


def cut_pixels(image: Image.Image, rows: int, columns: int, image_size: int) -> npt.NDArray[np.uint8]:
    """Resize an RGB picture into the grid, pad with black at the bottom and right, and split: [n, 3, S, S] uint8."""
    size = fitted_size(*image.size, rows, columns, image_size)
    pixels = np.asarray(image if size == image.size else image.resize(size, Image.Resampling.BILINEAR))
    canvas = np.zeros((rows * image_size, columns * image_size, 3), np.uint8)
    canvas[: size[1], : size[0]] = pixels
    grid = canvas.reshape(rows, image_size, columns, image_size, 3)
    return np.ascontiguousarray(grid.transpose(0, 2, 4, 1, 3)).reshape(rows * columns, 3, image_size, image_size)


def _normalised() -> npt.NDArray[np.float32]:
    """[3, 256]: (byte / 255 - mean) / std in float32, for each channel and each byte there is."""
    values = np.arange(256, dtype=np.float32)[None] / np.float32(255)
    return (values - np.array(MEAN, np.float32)[:, None]) / np.array(STD, np.float32)[:, None]


_NORMALISED = _normalised()


def normalise(pixels: npt.NDArray[np.uint8], out: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
    """CLIP's mean and standard deviation: [n, 3, S, S] uint8 → float32, into `out` where given."""
    if out is None:
        out = np.empty(pixels.shape, np.float32)
    for tile, target in zip(pixels, out):
        for channel in range(3):
            # mode "clip" only spares numpy a copy of the output: a byte is never out of range
            np.take(_NORMALISED[channel], tile[channel], out=target[channel], mode="clip")
    return out


def image_tiles(
    image: Image.Image, image_size: int, max_num_tiles: int
) -> tuple[npt.NDArray[np.float32], tuple[int, int]]:
    """An RGB picture as normalised tiles [n, 3, S, S] float32, and its grid (rows, columns), n = rows · columns.

    Raises:
        ImageError: the picture has no pixels, or is too narrow for any grid.
    """
    rows, columns = grid_of(image, image_size, max_num_tiles)
    return normalise(cut_pixels(image, rows, columns, image_size)), (rows, columns)


def grid_of(image: Image.Image, image_size: int, max_num_tiles: int) -> tuple[int, int]:
    """`choose_canvas` of a picture; an ImageError if it has no pixels."""
    if 0 in image.size:
        raise ImageError(f"the image has no pixels ({image.size[0]} x {image.size[1]}); give one that has some")
    return choose_canvas(*image.size, image_size, max_num_tiles)
