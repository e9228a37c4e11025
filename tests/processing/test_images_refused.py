import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from images_for_tests import PICTURE, RNG, encoded, message, png
from PIL import Image

from llama_multimodal.processing import images, open_image

# --- refusals ---


def test_bad_paths(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "kitchen.png")
    assert f'did you mean "{tmp_path / "kitchen.png"}"' in message(tmp_path / "kichen.png")
    assert "check the path" in message(str(tmp_path / "zzz.jpg"))
    assert "there is no folder" in message(tmp_path / "no" / "a.png")
    assert "is a folder" in message(tmp_path)
    assert "is an address" in message("https://example.org/a.png")
    message("a\0b.png")
    message("x" * 5000)
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in message(tmp_path / "pipe.png")
    for wrong in (None, 3, [PICTURE], {"url": "x"}):
        assert "must be a path" in message(wrong)


def test_not_an_image(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    assert "is empty" in message(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("hello")
    assert "not an image" in message(tmp_path / "text.png")
    assert "not an image" in message(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # would run a program
    for wrong in (
        np.zeros((2, 2, 2)),
        np.zeros(4),
        np.zeros((1, 2, 3, 3)),
        np.array([["a"]]),
        np.zeros((2, 2), complex),
    ):
        assert "is not an image" in message(wrong)


def test_zero_size() -> None:
    for wrong in (Image.new("RGB", (0, 5)), Image.new("L", (5, 0)), np.zeros((0, 5, 3), np.uint8)):
        assert "no pixels" in message(wrong)
    message(png(0, 5))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_truncated(format: str) -> None:
    data = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)), format)
    for part in (0.3, 0.6, 0.9):
        text = message(data[: int(len(data) * part)])
        assert "damaged" in text


# --- bombs ---


def huge_headers() -> dict[str, bytes]:
    jpeg = bytearray(encoded(PICTURE, "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 60000, 60000)
    gif = bytearray(encoded(PICTURE.convert("P"), "GIF"))
    gif[6:10] = struct.pack("<HH", 60000, 60000)
    bmp = bytearray(encoded(PICTURE, "BMP"))
    bmp[18:26] = struct.pack("<ii", 60000, 60000)
    extended = bytearray(
        encoded(Image.new("RGBA", (9, 9)), "WEBP", save_all=True, append_images=[PICTURE.resize((9, 9))])
    )
    assert extended[12:16] == b"VP8X"
    extended[24:30] = b"\xff\x3f\x00" * 2
    lossy = bytearray(encoded(PICTURE, "WEBP"))
    lossy[26:30] = struct.pack("<HH", 16383, 16383)
    lossless = bytearray(encoded(PICTURE, "WEBP", lossless=True))
    lossless[21:25] = (16382 | 16382 << 14).to_bytes(4, "little")
    return {
        "png": png(60000, 60000), "png 1 bit": png(2**31 - 1, 1000, 1, 0), "jpeg": bytes(jpeg), "gif": bytes(gif),
        "bmp": bytes(bmp), "ppm": b"P6 60000 60000 255\n", "webp extended": bytes(extended), "webp lossy": bytes(lossy),
        "webp lossless": bytes(lossless),
    }  # fmt: skip


@pytest.mark.parametrize("name", huge_headers())
def test_bombs_are_refused_before_decoding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    assert "make it smaller" in message(huge_headers()[name])


def test_limits() -> None:
    side = 8192
    assert side * side == images.MAX_PIXELS
    assert "make it smaller" in message(np.broadcast_to(np.uint8(0), (side, side + 1)))
    assert "make it smaller" in message(png(side, side + 1, 1, 0))
    assert side * side > images.MAX_WEBP_PIXELS
    assert "damaged" in message(png(side, side, 1, 0))  # allowed, and then found to be cut short


def test_a_jpeg_of_too_many_scans() -> None:
    data = encoded(Image.new("RGB", (6000, 6000)), "JPEG", progressive=True, quality=5)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert data.count(b"\xff\xda") <= 16
    assert "scans" in message(data[:-2] + scan * 100 + data[-2:])


def test_slow_decoders() -> None:
    assert "written as text" in message(b"P3 2 1 255\n" + b"#c\n1 " * 6)
    assert "decodes slowly" in message(b"P6 9000 1000 65535\n")
    values = np.arange(12).reshape(2, 2, 3) * 90
    result = np.asarray(open_image(b"P6 2 2 1000\n" + values.astype(">u2").tobytes()), int)
    np.testing.assert_allclose(result, values * (255 / 1000), atol=1)


def test_big_files_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "big.png").open("wb") as file:
        file.truncate(images.MAX_FILE_BYTES + 1)  # sparse
    assert "make it smaller" in message(tmp_path / "big.png")


def test_whatever_a_decoder_raises_is_an_image_error(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Callable[[], Exception]] = [
        lambda: struct.error("x\ny"),
        lambda: SyntaxError("x"),
        MemoryError,
        IndexError,
        RecursionError,
    ]
    for error in errors:

        def load(*_: object, error: Callable[[], Exception] = error) -> None:
            raise error()

        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
        message(encoded(PICTURE, "PNG"))
