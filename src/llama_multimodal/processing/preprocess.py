"""One picture as the pixels of a vision encoder: resize, crop, scale, normalise, as its `Preprocess` says.

Bit for bit what the PIL image processors of transformers 5.23 give.

Shapes: H, W of the picture that is made · n pictures
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..config import Preprocess, preprocess_from_hf
from ..config.checks import require
from ..errors import ConfigError, ImageError
from .images import MAX_PIXELS

PREPROCESS_FILES = ("preprocessor_config.json", "processor_config.json")


def load_preprocess(folder: str | Path) -> Preprocess | None:
    """What a checkpoint folder's `preprocessor_config.json` says, else the table in `processor_config.json` (where
    transformers 5 writes it), else None.

    Raises:
        ConfigError: a file is damaged, or asks for what is not implemented.
    """
    for name in PREPROCESS_FILES:
        path = Path(folder) / name
        if not path.is_file():
            continue
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}; download it again") from error
        if isinstance(table, dict) and name == PREPROCESS_FILES[1]:
            table = table.get("image_processor")
            if table is None:  # an older one, which only says how prompts are made
                continue
        if not isinstance(table, dict):
            raise ConfigError(f"{path} must hold a table; download it again")
        try:
            return preprocess_from_hf(table)
        except ConfigError as error:
            raise ConfigError(f"{path.parent}: {error}") from error
    return None


def image_pixels(image: Image.Image, preprocess: Preprocess) -> npt.NDArray[np.float32]:
    """An RGB picture as normalised pixels [3, H, W] float32, for layout "single".

    Raises:
        ImageError: the picture has no pixels, or is so narrow that it would become too large.
    """
    require(preprocess.layout == "single", "layout must be single", preprocess)
    check_picture(image)
    if preprocess.pad_to_square:
        image = _pad_to_square(image, preprocess)
    if preprocess.size is not None:
        image = resized(image, *preprocess.size, preprocess.resample)
    elif preprocess.shortest_edge is not None:
        image = resized(image, *_shortest_edge_size(*image.size, preprocess.shortest_edge), preprocess.resample)
    pixels = np.asarray(image)
    if preprocess.crop is not None:
        pixels = _crop_middle(pixels, *preprocess.crop)
    return normalise(pixels[None], preprocess)[0]


def check_picture(image: Image.Image) -> None:
    if image.mode != "RGB":
        raise ImageError(f"the image is {image.mode}, not RGB; open it with open_image")
    if 0 in image.size:
        raise ImageError(f"the image has no pixels ({image.size[0]} x {image.size[1]}); give one that has some")


def resized(image: Image.Image, height: int, width: int, resample: int) -> Image.Image:
    """The picture in a new size.

    Raises:
        ImageError: it, or what Pillow has between its two passes (all rows of the old, all columns of the new),
            would be larger than any picture may be.
    """
    if image.size == (width, height):
        return image
    if width * max(height, image.height) > MAX_PIXELS:
        raise ImageError(
            f"an image of {image.width} x {image.height} pixels is too narrow to become {width} x {height};"
            " crop it to a less extreme shape"
        )
    return image.resize((width, height), Image.Resampling(resample))


def _shortest_edge_size(width: int, height: int, edge: int) -> tuple[int, int]:
    """(height, width) with `edge` as the shorter side."""
    if width <= height:
        return int(edge * height / width), edge
    return edge, int(edge * width / height)


def _crop_middle(pixels: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """[H, W, 3] → [height, width, 3]: cut, or set in black, each side by itself.

    Where the difference is odd, a cut keeps the later pixel and black gets its extra row or column first.
    """
    for axis, length in ((0, height), (1, width)):
        spare = pixels.shape[axis] - length
        if spare >= 0:
            start = spare // 2
            pixels = pixels[start : start + length] if axis == 0 else pixels[:, start : start + length]
        else:
            padding = [(0, 0)] * 3
            padding[axis] = ((1 - spare) // 2, -spare // 2)
            pixels = np.pad(pixels, padding)
    return pixels


def _pad_to_square(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    side = max(image.size)
    if side * side > MAX_PIXELS:
        raise ImageError(f"an image of {image.width} x {image.height} pixels is too large to pad to a square")
    red, green, blue = (int(mean * 255) for mean in preprocess.mean or ())
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def normalise(
    pixels: npt.NDArray[np.uint8], preprocess: Preprocess, out: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """[n, H, W, 3] uint8 → [n, 3, H, W] float32: scaled, less the mean, over the deviation; into `out` where given."""
    n, height, width, _ = pixels.shape
    if out is None:
        out = np.empty((n, 3, height, width), np.float32)
    table = _table(preprocess)
    for picture, target in zip(pixels, out):
        for channel in range(3):
            # mode "clip" only spares numpy a copy of the output: a byte is never out of range
            np.take(table[channel], picture[:, :, channel], out=target[channel], mode="clip")
    return out


def _table(preprocess: Preprocess) -> npt.NDArray[np.float32]:
    """[3, 256]: what becomes of each byte in each channel.

    As in the reference, the scale is applied in float64 and rounded once; mean and deviation in float32.
    """
    values = np.arange(256, dtype=np.float64)
    if preprocess.rescale_factor is not None:
        values *= preprocess.rescale_factor
    table = np.tile(values.astype(np.float32), (3, 1))
    if preprocess.mean is not None:
        table = (table - np.array(preprocess.mean, np.float32)[:, None]) / np.array(preprocess.std, np.float32)[:, None]
    return table
