from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from PIL import Image
from preprocess_for_tests import LLAVA_16, SHAPES, SIGLIP, picture, shapes

from llama_multimodal.config import preprocess_from_hf
from llama_multimodal.errors import ConfigError, ImageError
from llama_multimodal.inputs import ImageLayout
from llama_multimodal.processing.anyres import (
    anyres_pixels,
    choose_canvas,
    grid_of,
)

SIDE = 28
SMALL: dict[str, Any] = LLAVA_16 | {
    "size": {"shortest_edge": SIDE},
    "crop_size": {"height": SIDE, "width": SIDE},
    "image_grid_pinpoints": [
        [SIDE * rows, SIDE * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    ],
}
MANY = SMALL | {"image_grid_pinpoints": [[SIDE * r, SIDE * c] for r in range(1, 7) for c in range(1, 7) if r * c < 10]}


def reference(settings: dict[str, Any]) -> Any:
    pytest.importorskip("transformers")
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    return LlavaNextImageProcessorPil.from_dict(settings)


def check(settings: dict[str, Any], size: tuple[int, int], processor: Any) -> tuple[int, int]:
    """Pixels of one picture against transformers; its grid."""
    image = picture(*size)
    pixels, grid = anyres_pixels(image, preprocess_from_hf(settings))
    assert grid == grid_of(image, preprocess_from_hf(settings))
    assert pixels.dtype == np.float32
    assert np.array_equal(pixels, processor(image, return_tensors="np")["pixel_values"][0]), size
    return grid


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, grids", [(SMALL, 5), (MANY, 12)], ids=["small", "many"])
def test_every_shape(settings: dict[str, Any], grids: int) -> None:
    processor = reference(settings)
    assert len({check(settings, size, processor) for size in shapes(90, most=200)}) >= grids


def test_published_settings() -> None:
    processor = reference(LLAVA_16)
    sizes = [*SHAPES[2::3], (900, 301), (333, 1000), (700, 650), (1, 100), (100, 1)]
    assert {check(LLAVA_16, size, processor) for size in sizes} == {(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)}


@pytest.mark.parametrize(
    "changes",
    [
        {"do_resize": False},
        {"do_center_crop": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_normalize": False, "resample": 1},
        {"size": {"height": SIDE, "width": SIDE}, "do_pad": False},
        {"image_grid_pinpoints": [[SIDE, SIDE]]},
    ],
    ids=str,
)
def test_switches_are_honoured(changes: dict[str, Any]) -> None:
    settings = SMALL | changes
    processor = reference(settings)
    for size in ((70, 33), (28, 28), (5, 90), (1, 1), (57, 55)):
        check(settings, size, processor)


def test_canvases_of_many_sizes() -> None:
    pytest.importorskip("transformers")
    from transformers.image_processing_utils import select_best_resolution

    many = MANY["image_grid_pinpoints"]
    for pinpoints in (LLAVA_16["image_grid_pinpoints"], many, many[::-1]):  # the largest first: ties are by waste
        for width, height in many_sizes():
            theirs = select_best_resolution((height, width), pinpoints)
            assert choose_canvas(width, height, [(h, w) for h, w in pinpoints]) == theirs, (width, height)


def many_sizes() -> list[tuple[int, int]]:
    """The first four fill a whole number of patches, and floats come out a hair below it."""
    rng = random.Random(1)
    sizes = [(round(2 ** rng.uniform(0, 13)), round(2 ** rng.uniform(0, 13))) for _ in range(1500)]
    exact = [(55, 264), (264, 55), (47, 1128), (1128, 47)]
    return [*exact, *sizes, *((width, width * k // 4) for width in range(4, 1000, 7) for k in (1, 2, 4, 8, 12))]


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy, additional", [("default", 1), ("full", 0)])
def test_tokens(strategy: str, additional: int) -> None:
    """`default` drops the class token that was counted; a tower without one has `full` and none to count."""
    pytest.importorskip("transformers")
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    processor = object.__new__(LlavaNextProcessor)  # as its own constructor leaves it, which needs a tokenizer
    processor.patch_size, processor.image_token = 14, "<image>"
    processor.vision_feature_select_strategy, processor.num_additional_image_tokens = strategy, additional
    processor.image_processor = reference(LLAVA_16)
    preprocess = preprocess_from_hf(LLAVA_16)
    crops = np.broadcast_to(np.float32(0), (1, 5, 3, 336, 336))
    for width, height in many_sizes():
        theirs = processor.replace_image_token({"pixel_values": crops, "image_sizes": [(height, width)]}, 0)
        canvas = choose_canvas(width, height, preprocess.grid_pinpoints)
        ours = ImageLayout(canvas[0] // 336, canvas[1] // 336, size=(width, height)).anyres_tokens(24)
        assert ours * len("<image>") == len(theirs), (width, height)


def test_the_patches_that_are_kept() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    for width, height in many_sizes()[:600]:
        for rows, columns in ((1, 1), (1, 3), (2, 2), (3, 1)):
            patches = torch.arange(rows * 5 * columns * 5).view(1, rows * 5, columns * 5)
            high, wide = ImageLayout(rows, columns, size=(width, height)).unpadded_patches(5)
            theirs = unpad_image(patches, (height, width))
            assert torch.equal(patches[:, high, wide], theirs), (width, height, rows, columns)


def test_a_count_by_hand() -> None:
    # 600 x 300 on 1 x 2 crops: no padding, so 24 rows of 48 patches and a newline, after 24 x 24 of the whole.
    assert ImageLayout(1, 2, size=(600, 300)).anyres_tokens(24) == 24 * 24 + 24 * 49
    # 600 x 250: 20 of 24 rows, 2 off on either side.
    assert ImageLayout(1, 2, size=(600, 250)).unpadded_patches(24) == (slice(2, 22), slice(0, 48))
    assert ImageLayout(1, 2, size=(600, 250)).anyres_tokens(24) == 24 * 24 + 20 * 49
    # So narrow that no column is left: only the newlines are.
    assert ImageLayout(3, 1, size=(1, 1000)).anyres_tokens(24) == 24 * 24 + 72


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    preprocess = preprocess_from_hf(SMALL)
    with pytest.raises(ImageError, match="no pixels"):
        anyres_pixels(Image.new("RGB", (5, 0)), preprocess)
    with pytest.raises(ImageError, match="is L, not RGB"):
        anyres_pixels(Image.new("L", (5, 5)), preprocess)
    with pytest.raises(ImageError, match="too narrow"):
        anyres_pixels(Image.new("RGB", (1, 3_000_000)), preprocess)
    with pytest.raises(ConfigError, match="layout must be anyres"):
        anyres_pixels(Image.new("RGB", (5, 5)), preprocess_from_hf(SIGLIP))
