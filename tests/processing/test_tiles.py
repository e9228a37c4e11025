"""Tiles against Meta's, bit for bit: `golden/image_transform.json` holds a hash for 514 sizes at two tile sizes."""

import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llama_multimodal.config import TiledVisionConfig
from llama_multimodal.errors import ImageError
from llama_multimodal.processing.tiles import MEAN, STD, choose_canvas, cut_pixels, fitted_size, image_tiles, normalise

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import inputs  # noqa: E402

FILE = json.loads((GOLDEN / "image_transform.json").read_text())
GRIDS = TiledVisionConfig().aspect_ratios


def digest(tiles: np.ndarray) -> str:
    return hashlib.sha256(tiles.astype("<f4").tobytes()).hexdigest()[:32]


def entries(part: str):
    for width, height, seed, at_560, at_448 in FILE[part]:
        yield width, height, seed, 560, at_560
        yield width, height, seed, 448, at_448


@pytest.mark.parametrize("part", ["sizes", "large"])
def test_bit_identical_to_the_reference(part: str) -> None:
    seen = set()
    for width, height, seed, tile, expected in entries(part):
        picture = Image.fromarray(inputs.image(width, height, seed))
        if len(expected) == 1:  # the reference raises
            with pytest.raises(ImageError, match="too narrow"):
                image_tiles(picture, tile, 4)
            continue
        tiles, (rows, columns) = image_tiles(picture, tile, 4)
        assert tiles.dtype == np.float32
        assert tiles.shape == (rows * columns, 3, tile, tile)
        assert [rows, columns, digest(tiles)] == expected, (width, height, tile)
        seen.add((rows, columns))
    assert part == "large" or seen == set(GRIDS)


def test_stored_tiles() -> None:
    """The few that are stored in full show *where* a difference is."""
    with np.load(GOLDEN / "image_tiles.npz") as stored:
        for name in stored:
            size, seed, tile = name.split(".")
            width, height = map(int, size.split("x"))
            picture = Image.fromarray(inputs.image(width, height, int(seed)))
            tiles, _ = image_tiles(picture, int(tile), 4)
            np.testing.assert_array_equal(tiles[:, :, ::16, ::16], stored[name])


def test_padding_is_black_at_the_bottom_and_right() -> None:
    picture = Image.new("RGB", (900, 300), (255, 255, 255))
    rows, columns = choose_canvas(900, 300, 448, 4)
    pixels = cut_pixels(picture, rows, columns, 448)
    whole = pixels.reshape(rows, columns, 3, 448, 448).transpose(0, 3, 1, 4, 2).reshape(rows * 448, columns * 448, 3)
    width, height = fitted_size(900, 300, rows, columns, 448)
    assert (whole[:height, :width] == 255).all()
    assert not whole[height:].any() and not whole[:, width:].any()


def test_normalise_is_clip() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, axis=1)
    mean, std = (np.array(x)[None, :, None, None] for x in (MEAN, STD))
    np.testing.assert_allclose(normalise(pixels), (pixels / 255 - mean) / std, rtol=1e-6, atol=1e-7)
    assert normalise(np.zeros((0, 3, 4, 4), np.uint8)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("max_num_tiles", [1, 2, 3, 4, 6, 9])
def test_canvas_is_a_grid_of_the_config(max_num_tiles: int) -> None:
    grids = TiledVisionConfig(max_num_tiles=max_num_tiles).aspect_ratios
    rng = np.random.default_rng(max_num_tiles)
    for width, height in np.exp(rng.uniform(0, 9, (300, 2))).astype(int):
        assert choose_canvas(int(width), int(height), 56, max_num_tiles) in grids


def test_a_large_picture_is_quick() -> None:
    picture = Image.fromarray(inputs.image(2000, 2000, 1))
    best = min(_seconds(picture) for _ in range(3))
    assert best < 1  # about 0.03 on an idle core


def _seconds(picture: Image.Image) -> float:
    start = time.perf_counter()
    image_tiles(picture, 560, 4)
    return time.perf_counter() - start


def test_no_pixels() -> None:
    with pytest.raises(ImageError, match="no pixels"):
        image_tiles(Image.new("RGB", (0, 5)), 56, 4)
