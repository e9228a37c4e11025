import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from llama_multimodal.errors import ImageError
from llama_multimodal.processing import images, open_image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 30, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def message(source: object) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(source)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def png(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    """A PNG whose header claims what it likes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


# --- sources and formats ---


def test_every_source_gives_the_same(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    PICTURE.save(path)
    data = path.read_bytes()
    for source in (path, str(path), data, bytearray(data), memoryview(data), PICTURE, Image.open(path), PIXELS):
        result = open_image(source)  # type: ignore[arg-type]
        assert type(result) is Image.Image and result.mode == "RGB" and result.info == {}
        np.testing.assert_array_equal(np.asarray(result), PIXELS)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG"])
def test_formats(format: str) -> None:
    smooth = Image.linear_gradient("L").resize((30, 20)).convert("RGB")
    options: dict = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(format, {})
    result = np.asarray(open_image(encoded(smooth, format, **options)), int)
    np.testing.assert_allclose(result, np.asarray(smooth), atol=3 if format == "JPEG" else 0)


def test_a_pil_image_is_not_changed() -> None:
    for image in (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), Image.new("RGB", (4, 4)), Image.new("I;16", (4, 4))):
        image.info["comment"] = "mine"
        before = (image.mode, image.size, image.tobytes(), dict(image.info))
        open_image(image)
        assert (image.mode, image.size, image.tobytes(), dict(image.info)) == before


# --- orientation ---


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation(orientation: int, format: str) -> None:
    upright = Image.new("RGB", (60, 40), (255, 255, 255))
    ImageDraw.Draw(upright).rectangle((0, 0, 29, 19), fill=(200, 0, 0))
    ImageDraw.Draw(upright).rectangle((30, 0, 59, 19), fill=(0, 0, 200))
    undo = {5: 5, 6: 2, 7: 6, 8: 4, 2: 0, 3: 3, 4: 1}  # PIL's transposition that EXIF's orientation undoes
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    data = encoded(stored, format, exif=exif, **options)
    for source in (data, Image.open(io.BytesIO(data))):
        result = open_image(source)
        assert result.size == (60, 40)
        np.testing.assert_allclose(np.asarray(result, int), np.asarray(upright), atol=40)  # JPEG at the edges
        assert open_image(result).tobytes() == result.tobytes()  # once is enough


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_ignored() -> None:
    data = encoded(PICTURE, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(np.asarray(open_image(data)), PIXELS)


# --- transparency ---


def test_transparency_is_white() -> None:
    rgba = np.dstack([PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)])
    rgba[:, 10:20, 3] = 128
    rgba[:, 20:, 3] = 255
    for source in (rgba, Image.fromarray(rgba), encoded(Image.fromarray(rgba), "PNG")):
        result = np.asarray(open_image(source))
        assert (result[:, :10] == 255).all()
        half = PIXELS[:, 10:20] * (128 / 255) + 255 * (127 / 255)
        np.testing.assert_allclose(result[:, 10:20], half, atol=1)
        np.testing.assert_array_equal(result[:, 20:], PIXELS[:, 20:])


def test_transparency_of_every_mode() -> None:
    grey = Image.new("LA", (2, 1), (50, 0))
    grey.putpixel((1, 0), (50, 255))
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 50, 50, 50])
    palette.putpixel((1, 0), 1)
    cases = [
        encoded(grey, "PNG"),
        grey,
        encoded(palette, "PNG", transparency=0),
        encoded(palette, "GIF", transparency=0),
    ]
    key = Image.new("RGB", (2, 1), (1, 2, 3))
    key.putpixel((1, 0), (50, 50, 50))
    cases.append(encoded(key, "PNG", transparency=(1, 2, 3)))
    plain = Image.new("L", (2, 1), 7)
    plain.putpixel((1, 0), 50)
    cases.append(encoded(plain, "PNG", transparency=7))
    for case in cases:
        assert np.asarray(open_image(case)).tolist() == [[[255] * 3, [50] * 3]]  # type: ignore[arg-type]
    assert np.asarray(open_image(encoded(palette, "PNG"))).tolist() == [[[10, 20, 30], [50, 50, 50]]]


def test_strips_of_a_large_transparent_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    rgba = Image.fromarray(RNG.integers(0, 256, (37, 30, 4), np.uint8))
    whole = open_image(rgba)
    monkeypatch.setattr(images, "_STRIP_PIXELS", 100)
    assert open_image(rgba).tobytes() == whole.tobytes()


# --- depths and colour spaces ---

WIDE = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_is_scaled_not_clipped(format: str) -> None:
    expected = np.round(WIDE / 257)
    for source in (encoded(Image.fromarray(WIDE), format), Image.fromarray(WIDE), WIDE, WIDE.astype(np.int32)):
        result = np.asarray(open_image(source), int)
        np.testing.assert_allclose(result, expected[:, :, None].repeat(3, 2), atol=0.51)
    dark = WIDE // 300  # below 256, and still 16-bit
    assert np.asarray(open_image(encoded(Image.fromarray(dark), format))).max() == 1


def test_16_bit_colour_arrays() -> None:
    colour = np.dstack([WIDE, WIDE[::-1], WIDE])
    np.testing.assert_array_equal(np.asarray(open_image(colour)), np.round(colour / 257))


def test_floats_say_what_white_is_by_their_range() -> None:
    ramp = np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)
    expected = np.floor(ramp * 255 + 0.5)[:, :, None].repeat(3, 2)
    sources: list = [ramp, ramp.astype(np.float64), Image.fromarray(ramp), encoded(Image.fromarray(ramp), "TIFF")]
    sources += [ramp * 255, ramp.astype(np.float16), np.dstack([ramp] * 3), ramp[:, :, None]]
    for source in sources:
        np.testing.assert_allclose(np.asarray(open_image(source), int), expected, atol=1)
    for wrong in (ramp - 0.5, ramp * 1e6, np.full((2, 2), np.nan), np.full((2, 2), np.inf)):
        assert "scale them" in message(wrong)
        assert "scale them" in message(Image.fromarray(wrong.astype(np.float32)))


def test_other_modes() -> None:
    bits = Image.fromarray((WIDE > 30000).astype(np.uint8) * 255).convert("1")
    for source in (bits, encoded(bits, "PNG"), encoded(bits, "TIFF"), WIDE > 30000):
        assert np.array_equal(np.asarray(open_image(source))[:, :, 0] == 255, WIDE > 30000)
    cmyk = Image.new("CMYK", (3, 2), (0, 255, 255, 0))
    for data in (encoded(cmyk, "JPEG", quality=100), encoded(cmyk, "TIFF")):
        np.testing.assert_allclose(np.asarray(open_image(data), int), [[[255, 0, 0]] * 3] * 2, atol=3)
    for mode in ("YCbCr", "HSV"):
        result = open_image(Image.new("RGB", (3, 2), (200, 100, 50)).convert(mode))
        np.testing.assert_allclose(np.asarray(result, int), [[[200, 100, 50]] * 3] * 2, atol=3)
    assert "LAB" in message(Image.new("LAB", (3, 2)))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
    assert np.asarray(open_image(data))[0, 0].tolist() == [255, 0, 0]


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
    values = np.arange(12, dtype=">u2").reshape(2, 2, 3) * 90
    result = np.asarray(open_image(b"P6 2 2 1000\n" + values.tobytes()), int)
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
