import io
from pathlib import Path

import numpy as np
import pytest
from images_for_tests import PICTURE, PIXELS, RNG, encoded, message
from PIL import Image, ImageDraw

from llama_multimodal.processing import images, open_image

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
