"""Open any picture as RGB, the way up and the colours that people see; refuse what cannot be one.

A picture is refused by the size that its header claims, before any of its pixels are decoded.
"""

from __future__ import annotations

import difflib
import functools
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError

from ..errors import ImageError

ImageSource = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray

MAX_PIXELS = 64 * 2**20  # of one picture; the most that decoding then takes is below 1 GB
MAX_WEBP_PIXELS = MAX_PIXELS // 2  # Pillow holds four copies of a WebP while it decodes it
MAX_SLOW_PIXELS = 2**20  # where Pillow's decoder is a loop in Python: about 2 seconds
MAX_FILE_BYTES = 512 * 2**20
MAX_SCANNED_PIXELS = 2**30  # a JPEG may be sent in scans, each over every pixel: a small file can ask for a lot of work

# EPS (it runs a program) and formats without a signature are not read.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
_FORMAT_NAMES = "PNG, JPEG, GIF, WebP, BMP, TIFF, PPM and AVIF"

_STRIP_PIXELS = 2**20  # pixels converted at a time where a conversion needs room for itself
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(source: ImageSource) -> Image.Image:
    """A picture as an RGB `PIL.Image`.

    Rotated as its EXIF says, on white where it is transparent, the first frame of an animation, 16-bit and float
    values scaled to bytes.

    Args:
        source: a path, the bytes of a file, a PIL image (its current frame; never changed), or an array [H, W],
            [H, W, 1], [H, W, 3] or [H, W, 4] of bool, uint8, uint16, or float in 0…1.

    Raises:
        ImageError: and nothing else, whatever the bytes are: no such file, not a picture, damaged, empty, too large.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "the image")
    if isinstance(source, np.ndarray):
        return _decode(_from_array(source), "the array")
    if isinstance(source, bytes | bytearray | memoryview):
        return _read(io.BytesIO(source), len(source), "the image data")
    if isinstance(source, str | os.PathLike):
        return _open_file(source)
    raise ImageError(f"an image must be a path, bytes, a PIL image or an array, not {type(source).__name__}")


# --- files -----------------------------------------------------------------------------------------------------------


def _open_file(source: str | os.PathLike[str]) -> Image.Image:
    path = Path(source)
    name = str(path) if len(str(path)) < 200 else f"{str(path)[:200]}…"
    if str(source).startswith(("http:", "https:", "data:")):
        raise ImageError(f"{name} is an address, not a file; download it and give its path or bytes")
    try:
        if path.is_dir():
            raise ImageError(f"{name} is a folder; give one image file")
        if not path.exists():
            raise ImageError(f"{name} does not exist{_nearest(path)}")
        if not path.is_file():
            raise ImageError(f"{name} is not a regular file; give an image file")
        with path.open("rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size, name)
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the path
        raise ImageError(f"{name!r} is not a path: {error}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _nearest(path: Path) -> str:
    """`; did you mean "…"?` for a file of like name in the same folder, or what else may help."""
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent}"
    try:
        close = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1, cutoff=0.6)
    except OSError:
        close = []
    return f'; did you mean "{path.parent / close[0]}"?' if close else "; check the path"


def _read(file: IO[bytes], num_bytes: int, name: str) -> Image.Image:
    if num_bytes == 0:
        raise ImageError(f"{name} is empty (0 bytes); give an image file")
    if num_bytes > MAX_FILE_BYTES:
        size, most = num_bytes >> 20, MAX_FILE_BYTES >> 20
        raise ImageError(f"{name} has {size} MiB; at most {most} MiB are read, make it smaller")
    try:
        head = file.read(64)
        file.seek(0)
        _refuse_bomb(*_webp_size(head), name, MAX_WEBP_PIXELS)  # Pillow makes room for its pixels as it opens one
        with Image.open(file, formats=_formats()) as image:
            _refuse_bomb(*image.size, name)
            if image.format in ("JPEG", "MPO"):  # MPO: a JPEG that more pictures follow
                _refuse_scans(file, *image.size, name)
            _refuse_slow(image, name)
            return _decode(image, name)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image, or is damaged; readable are {_FORMAT_NAMES}") from None
    except Exception as error:  # decoders raise whatever they stumble over: struct.error, SyntaxError, IndexError, …
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> ImageError:
    if isinstance(error, MemoryError | Image.DecompressionBombError):
        return ImageError(f"{name} needs too much memory to decode; make it smaller")
    reason = " ".join(str(error).split()) or type(error).__name__
    return ImageError(f"{name} is damaged and cannot be decoded ({reason[:200]}); save or download it again")


def _refuse_bomb(width: int, height: int, name: str, most: int = MAX_PIXELS) -> None:
    if width * height > most:
        raise ImageError(f"{name} is {width} x {height} pixels; at most {most:,} pixels are decoded, make it smaller")


def _webp_size(head: bytes) -> tuple[int, int]:
    """(width, height) of a WebP's canvas by its first bytes; (0, 0) of anything else."""
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return 0, 0
    if head[12:16] == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def _refuse_scans(file: IO[bytes], width: int, height: int, name: str) -> None:
    """Refuse a JPEG of very many scans. An ordinary one has 1, a progressive one about 10."""
    place = file.tell()
    file.seek(0)
    scans = 0
    while block := file.read(2**20):
        scans += block.count(b"\xff\xda")
    file.seek(place)
    if scans > 16 and scans * width * height > MAX_SCANNED_PIXELS:
        raise ImageError(f"{name} is a JPEG of {scans} scans of {width} x {height} pixels; save it as an ordinary JPEG")


def _refuse_slow(image: ImageFile.ImageFile, name: str) -> None:
    """Refuse what a small file could keep Pillow's decoders in Python busy with for minutes."""
    codecs = {tile[0] for tile in image.tile} & set(Image.DECODERS)
    if "ppm_plain" in codecs:  # its time grows with the square of the number of comments
        raise ImageError(f"{name} is a PPM written as text; save it as PNG")
    if codecs and image.width * image.height > MAX_SLOW_PIXELS:
        raise ImageError(
            f"{name} is {image.width} x {image.height} pixels of a rare kind of {image.format} that decodes slowly;"
            " save it as PNG"
        )


# --- pixels ----------------------------------------------------------------------------------------------------------


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Load the pixels and convert them. What is returned carries no EXIF: it is upright already."""
    if 0 in image.size:
        raise ImageError(f"{name} has no pixels ({image.size[0]} x {image.size[1]}); give one that has some")
    _refuse_bomb(*image.size, name)
    try:
        image.load()
        rgb = _to_rgb(image)
        turn = _UPRIGHT.get(_orientation(image))
        if turn is not None:
            rgb = rgb.transpose(turn)
        elif rgb is image:
            rgb = image.copy()
    except ImageError:
        raise
    except Exception as error:
        raise _damaged(name, error) from error
    rgb.info = {}
    return rgb


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # a damaged EXIF block does not make the picture unreadable
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image itself if it is RGB already."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_wide(image)
    if image.has_transparency_data:
        rgb = Image.new("RGB", image.size, (255, 255, 255))
        for box, strip in _strips(image):
            rgba = strip.convert("RGBA")
            rgb.paste(rgba.convert("RGB"), box, mask=rgba.getchannel("A"))
        return rgb
    if image.mode == "LAB":
        raise ImageError("the image is in the LAB colour space; save it as RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[tuple[int, int, int, int], Image.Image]]:
    """The picture from top to bottom in boxes of about a million pixels, so that a copy costs little memory."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        yield box, image.crop(box)


def _from_wide(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float greyscale: the range of the values says what white is (1, 255 or 65535)."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        white = 65535.0  # 16 bits by format, however dark the picture is
    else:
        low, high = (float(value) for value in image.getextrema())  # type: ignore[arg-type]
        white = _white(low, high, whole=image.mode != "F")
    grey = Image.new("L", image.size)
    for box, strip in _strips(image):
        grey.paste(Image.fromarray(_to_bytes(np.asarray(strip), white)), box)
    return grey.convert("RGB")


def _white(low: float, high: float, whole: bool) -> float:
    if not (low >= 0 and high <= 65535):  # also where either is NaN
        raise ImageError(f"the image has values from {low:g} to {high:g}; scale them to 0…255, or to 0…1 as floats")
    if high <= 1 and not whole:
        return 1.0
    return 255.0 if high <= 255 else 65535.0


def _to_bytes(values: npt.NDArray, white: float) -> npt.NDArray[np.uint8]:
    return np.floor(values.astype(np.float32) * np.float32(255 / white) + np.float32(0.5)).astype(np.uint8)


def _from_array(array: npt.NDArray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(f"an array of shape {array.shape} is not an image; it must be [H, W], [H, W, 3] or [H, W, 4]")
    if 0 in array.shape:
        raise ImageError(f"an array of shape {array.shape} has no pixels; give one that has some")
    _refuse_bomb(array.shape[1], array.shape[0], "the array")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint16:
        array = _to_bytes(array, 65535.0)
    elif array.dtype.kind in "iuf" and array.dtype != np.uint8:
        low, high = float(array.min()), float(array.max())
        array = _to_bytes(array, _white(low, high, whole=array.dtype.kind != "f"))
    elif array.dtype != np.uint8:
        raise ImageError(f"an array of {array.dtype} is not an image; give uint8, or floats in 0…1")
    return Image.fromarray(np.ascontiguousarray(array))
