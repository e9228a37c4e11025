"""2,000 corrupted pictures: each is a picture or an ImageError, in under 5 seconds and under 1 GB."""

import io
import random
import resource
import time
import zlib

import numpy as np
import pytest
from PIL import Image, features

from llama_multimodal.errors import ImageError
from llama_multimodal.processing import open_image

COUNT = 2000
BATCHES = 10


def sources() -> list[bytes]:
    """Small files of every format and most of its variants."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (40, 52, 3), np.uint8))
    smooth = Image.linear_gradient("L").resize((52, 40))
    rgb, rgba = smooth.convert("RGB"), smooth.convert("RGBA")
    rgba.putalpha(smooth.transpose(Image.Transpose.FLIP_TOP_BOTTOM))
    wide = Image.fromarray(rng.integers(0, 65536, (40, 52), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [rgb.rotate(90), noise]}
    files: list[tuple[Image.Image, str, dict]] = [
        (rgb, "PNG", {}), (noise, "PNG", {"exif": exif}), (rgba, "PNG", {}), (smooth, "PNG", {}), (wide, "PNG", {}),
        (rgb.quantize(16), "PNG", {"transparency": 3}), (smooth.convert("1"), "PNG", {}), (rgb, "PNG", frames),
        (rgb, "JPEG", {"exif": exif}), (noise, "JPEG", {"progressive": True}), (smooth, "JPEG", {}),
        (rgb.convert("CMYK"), "JPEG", {}), (noise, "JPEG", {"subsampling": 0, "comment": "x" * 50}),
        (rgb, "MPO", frames), (rgb, "GIF", {}), (rgb.quantize(8), "GIF", {"transparency": 2, "interlace": 1}),
        (noise, "GIF", frames), (noise, "WEBP", {}), (rgb, "WEBP", {}), (rgba, "WEBP", frames),
        (rgba, "WEBP", {"lossless": True, "exif": exif}),
        (rgb, "BMP", {}), (rgb.quantize(16), "BMP", {}), (smooth.convert("1"), "BMP", {}), (rgba, "BMP", {}),
        (rgb, "TIFF", {}), (noise, "TIFF", {"compression": "tiff_lzw", "exif": exif}), (wide, "TIFF", {}),
        (rgb, "TIFF", {"compression": "jpeg"}), (smooth.convert("1"), "TIFF", {"compression": "group4"}),
        (smooth.convert("F"), "TIFF", {"compression": "packbits"}), (rgba, "TIFF", {"compression": "tiff_deflate"}),
        (rgb, "TIFF", frames), (rgb, "PPM", {}), (smooth, "PPM", {}), (smooth.convert("1"), "PPM", {}),
    ]  # fmt: skip
    if features.check("avif"):
        files += [(rgb, "AVIF", {}), (rgba, "AVIF", {"exif": exif})]
    out = []
    for image, format, options in files:
        file = io.BytesIO()
        if "append_images" in options:  # saving leaves its mark on an image, so each is saved once
            options = {**options, "append_images": [frame.copy() for frame in options["append_images"]]}
        image.copy().save(file, format, **options)
        out.append(file.getvalue())
    deep = b"P6\n# a comment\n52 40\n1000\n" + (np.asarray(wide) // 66).astype(">u2").repeat(3, axis=1).tobytes()
    return [*out, deep, _bmp_rle()]


def _bmp_rle() -> bytes:
    rows = b"".join(bytes([16, row, 0, 0]) for row in range(16)) + b"\0\1"
    header = (40).to_bytes(4, "little") + (16).to_bytes(4, "little") * 2 + b"\1\0\x08\0" + (1).to_bytes(4, "little")
    header += len(rows).to_bytes(4, "little") + bytes(8) + (256).to_bytes(4, "little") + bytes(4)
    palette = b"".join(bytes([i, 255 - i, i // 2, 0]) for i in range(256))
    offset = 14 + len(header) + len(palette)
    return (
        b"BM"
        + (offset + len(rows)).to_bytes(4, "little")
        + bytes(4)
        + offset.to_bytes(4, "little")
        + header
        + palette
        + rows
    )


SOURCES = sources()
EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 8000, 20000, 60000)


def corrupt(data: bytes, rng: random.Random) -> bytes:
    """One to three of: flipped bytes, a number replaced, a cut, a piece lost, doubled, or taken from another file."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        end = min(len(out), 120) if rng.random() < 0.6 else len(out)  # mostly the header
        at, kind = rng.randrange(max(end, 1)), rng.randrange(7)
        if kind == 0:
            for _ in range(rng.choice([1, 4, 30])):
                i = rng.randrange(len(out))
                out[i] ^= 1 << rng.randrange(8)
        elif kind in (1, 2):
            size = rng.choice([1, 2, 4])
            value = rng.choice(EXTREMES) % 256**size
            out[at : at + size] = value.to_bytes(size, rng.choice(["little", "big"]))
        elif kind == 3:
            del out[rng.randrange(len(out)) :]
        elif kind == 4:
            del out[at : at + rng.choice([1, 2, 10, 100])]
        elif kind == 5:
            out[at:at] = out[at : at + rng.choice([1, 4, 50])] * rng.choice([1, 1, 40])
        else:
            other = rng.choice(SOURCES)
            i = rng.randrange(len(other))
            out[at : at + 40] = other[i : i + rng.choice([4, 40, 400])]
        out = out or bytearray(b"\0")
    return _mend_checksums(bytes(out)) if rng.random() < 0.7 else bytes(out)


def _mend_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the right CRC, so that what was damaged reaches the decoder."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(out)


def test_sources_are_pictures() -> None:
    for data in SOURCES:
        assert open_image(data).size != (0, 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch", range(BATCHES))
def test_corrupted_pictures(batch: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened = refused = 0
    for seed in range(batch, COUNT, BATCHES):
        rng = random.Random(seed)
        data = corrupt(SOURCES[seed % len(SOURCES)], rng)
        start = time.process_time()
        try:
            image = open_image(data)
        except ImageError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 400, seed
        else:
            opened += 1
            assert image.mode == "RGB" and 0 not in image.size, seed
        assert time.process_time() - start < 5, seed
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert opened and refused > COUNT / BATCHES / 4  # the corruption is neither always fatal nor always harmless
