from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from PIL import Image
from preprocess_for_tests import ON, PUBLISHED, SMOLVLM, picture, shapes

from llama_multimodal.config import preprocess_from_hf
from llama_multimodal.errors import ConfigError, ImageError
from llama_multimodal.processing.splitting import grid_of, image_prompt, split_pixels

SPLIT = {name: raw for name, raw in PUBLISHED.items() if "max_image_size" in raw}
SMALL = SMOLVLM | {"max_image_size": {"longest_edge": 32}, "size": {"longest_edge": 128}}
UNEVEN = SMOLVLM | {"max_image_size": {"longest_edge": 28}, "size": {"longest_edge": 95}}


def reference(settings: dict[str, Any]) -> Any:
    pytest.importorskip("transformers")
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    kinds = {"Idefics3ImageProcessor": Idefics3ImageProcessorPil, "SmolVLMImageProcessor": SmolVLMImageProcessorPil}
    return kinds[settings["image_processor_type"]].from_dict(settings)


def check(settings: dict[str, Any], size: tuple[int, int], processor: Any = None) -> tuple[int, int]:
    """Pixels and grid of one picture against transformers; the grid."""
    image = picture(*size)
    output = (processor or reference(settings))([image], return_tensors="np", return_row_col_info=True)
    preprocess = preprocess_from_hf(settings)
    pixels, grid = split_pixels(image, preprocess)
    assert grid == (output["rows"][0][0], output["cols"][0][0]) == grid_of(image, preprocess), size
    assert pixels.dtype == np.float32
    assert np.array_equal(pixels, output["pixel_values"][0]), size
    return grid


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [SMALL, UNEVEN], ids=["small", "uneven"])
def test_every_shape(settings: dict[str, Any]) -> None:
    processor = reference(settings)
    grids = {check(settings, size, processor) for size in shapes(80)}
    assert {(1, 4), (4, 1), (4, 4), (3, 4), (4, 3)} <= grids


@pytest.mark.parametrize("name", SPLIT)
def test_published_settings(name: str) -> None:
    assert check(SPLIT[name], (500, 260)) > (1, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"do_image_splitting": False},
        {"size": {"longest_edge": 32}},  # one square, so nothing to split
        {"size": {"longest_edge": 20}},
        {"do_resize": False},
        {"do_resize": False, "do_image_splitting": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_pad": False, "resample": 3},
    ],
    ids=str,
)
def test_switches_are_honoured(changes: dict[str, Any]) -> None:
    for size in ((70, 33), (31, 32), (5, 90), (1, 1)):
        check(SMALL | changes, size)


def test_no_edge_is_longer_than_4096() -> None:
    settings = SMOLVLM | {"size": {"longest_edge": 9000}, "max_image_size": {"longest_edge": 64}, "resample": 0}
    assert check(settings, (90, 2)) == (2, 64)


def test_one_square_has_no_grid() -> None:
    assert check(SMALL | {"do_image_splitting": False}, (70, 33)) == (0, 0)
    assert check(SMALL | {"size": {"longest_edge": 32}}, (70, 33)) == (0, 0)


@pytest.mark.parametrize("settings", [*SPLIT.values(), UNEVEN, {**SMOLVLM, "size": {"longest_edge": 5000}}])
def test_grids_of_many_sizes(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pictures as large as they come: transformers' own steps, on arrays that have a shape and no pixels."""
    processor, preprocess = reference(settings), preprocess_from_hf(settings)
    resize = type(processor).__mro__[1]
    monkeypatch.setattr(
        resize, "resize", lambda self, image, size, **_: np.broadcast_to(np.uint8(0), (3, size.height, size.width))
    )
    rng = random.Random(1)
    sizes = [(round(2 ** rng.uniform(0, 13)), round(2 ** rng.uniform(0, 13))) for _ in range(400)]
    side, edge = settings["max_image_size"]["longest_edge"], settings["size"]["longest_edge"]
    sizes += [(edge, k * side + d) for k in range(1, 5) for d in (-2, -1, 0, 1, 2)]
    for width, height in [*sizes, *((height, width) for width, height in sizes)]:
        image = np.broadcast_to(np.uint8(0), (3, height, width))
        image = processor.resize(image, processor.size)
        image = processor.resize_for_vision_encoder(image, side)
        _, rows, columns = processor.split_images(image, processor.max_image_size)
        assert grid_of(_Sized(width, height), preprocess) == (rows, columns), (width, height)


class _Sized(Image.Image):
    """A picture without pixels: only its size is asked for."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self._size, self._mode = (width, height), "RGB"


# --- prompt ----------------------------------------------------------------------------------------------------------


def test_prompts() -> None:
    pytest.importorskip("transformers")
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
    from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

    for kind, global_name in ((Idefics3Processor, "global_image_tag"), (SmolVLMProcessor, "global_image_token")):
        processor = object.__new__(kind)  # as its own constructor leaves it, which needs a tokenizer
        processor.fake_image_token, processor.image_token = "<fake_token_around_image>", "<image>"
        setattr(processor, global_name, "<global-img>")
        for image_seq_len in (64, 169, 1):
            processor.image_seq_len = image_seq_len
            for rows, columns in [(0, 0), *((rows, columns) for rows in range(1, 9) for columns in range(1, 9))]:
                theirs = processor.replace_image_token({"rows": [[3], [rows]], "cols": [[3, columns]]}, 1)
                assert image_prompt(rows, columns, image_seq_len) == theirs


def test_a_prompt() -> None:
    assert image_prompt(0, 0, 2) == "<fake_token_around_image><global-img><image><image><fake_token_around_image>"
    assert image_prompt(1, 2, 1) == (
        "<fake_token_around_image><row_1_col_1><image><fake_token_around_image><row_1_col_2><image>\n"
        "\n<fake_token_around_image><global-img><image><fake_token_around_image>"
    )


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    preprocess = preprocess_from_hf(SMALL | {"do_resize": False})
    with pytest.raises(ImageError, match="no pixels"):
        split_pixels(Image.new("RGB", (5, 0)), preprocess)
    with pytest.raises(ImageError, match="is RGBA, not RGB"):
        split_pixels(Image.new("RGBA", (5, 5)), preprocess)
    with pytest.raises(ImageError, match="too narrow"):
        split_pixels(Image.new("RGB", (1, 3_000_000)), preprocess)
    with pytest.raises(ConfigError, match="layout must be split"):
        split_pixels(
            Image.new("RGB", (5, 5)), preprocess_from_hf(ON | {"image_processor_type": "SiglipImageProcessor"})
        )
