from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from preprocess_for_tests import HALF, ON, SIGLIP, picture, problem
from small_encoders import peer

from llama_multimodal.config import Preprocess, preprocess_from_hf
from llama_multimodal.errors import ConfigError, ImageError
from llama_multimodal.processing.naflex import naflex_pixels, target_size
from llama_multimodal.processing.preprocess import image_pixels
from llama_multimodal.weights.load_encoder import load_encoder

NAFLEX: dict[str, Any] = {  # google/siglip2-base-patch16-naflex
    **ON, "do_convert_rgb": None, "image_mean": HALF, "image_processor_type": "Siglip2ImageProcessor",
    "image_std": HALF, "max_num_patches": 256, "patch_size": 16, "processor_class": "Siglip2Processor", "resample": 2,
}  # fmt: skip
NARROW = [(1, 1), (1, 2), (1, 500), (500, 1), (3, 2000), (2000, 3), (16, 16), (15, 17), (256, 256), (257, 255)]


def reference(settings: dict[str, Any]) -> Any:
    """The PIL processor of transformers that reads such a file."""
    pytest.importorskip("transformers")
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    return Siglip2ImageProcessorPil.from_dict(settings)


def cut(pixels: npt.NDArray, patch: int) -> npt.NDArray:
    """[3, R·P, C·P] → [R·C, P·P·3]: row, column, channel."""
    _, height, width = pixels.shape
    grid = pixels.reshape(3, height // patch, patch, width // patch, patch)
    return grid.transpose(1, 3, 2, 4, 0).reshape(-1, patch * patch * 3)


def check(settings: dict[str, Any], size: tuple[int, int], processor: Any) -> None:
    """Pixels and grid of one picture against transformers."""
    image, preprocess = picture(*size), preprocess_from_hf(settings)
    before = image.tobytes()
    output = processor(image, return_tensors="np")
    pixels, patch = naflex_pixels(image, preprocess), preprocess.patch_size or 0
    count = pixels[0].size // patch**2
    assert pixels.dtype == np.float32
    assert output["spatial_shapes"][0].tolist() == [pixels.shape[1] // patch, pixels.shape[2] // patch], size
    assert output["pixel_attention_mask"][0].sum() == count, size
    assert np.array_equal(cut(pixels, patch), output["pixel_values"][0][:count]), size
    assert image.tobytes() == before


# --- the size --------------------------------------------------------------------------------------------------------


def test_sizes() -> None:
    """Against transformers: every ratio, sides to 2^26 and their neighbours, patches and numbers of them alike."""
    pytest.importorskip("transformers")
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    rng = random.Random(0)
    longest = (3, 9, 12, 12, 12, 26)
    sizes = [(round(2 ** rng.uniform(0, e)), round(2 ** rng.uniform(0, e))) for e in rng.choices(longest, k=2000)]
    sizes += [(1, 1), (1, 2**26), (2**26, 1), (2**26, 2**26), (1_000_001, 1), (1, 999_999), (4096, 1), (1, 4097)]
    sizes += [(16 * a + d, 16 * b) for a in (1, 4, 16, 64) for b in (1, 4, 16, 64) for d in (-1, 0, 1)]
    for width, height in sizes:
        for patch, most in ((16, 256), (rng.randint(1, 32), rng.choice((1, 2, 3, 64, 576, 1024)))):
            expected = get_image_size_for_max_num_patches(height, width, patch, most)
            assert target_size(width, height, patch, most) == expected, (width, height, patch, most)


def test_a_size() -> None:
    assert target_size(640, 480, 16, 256) == (224, 288)  # 14 x 18 patches; with a row or a column more: 270, 266
    assert target_size(1, 1, 16, 256) == (112, 112)  # enlarged a hundred times at most
    assert target_size(1, 9999, 16, 64) == (1024, 16)


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [64, 256, 1024])
def test_pixels(most: int) -> None:
    settings = NAFLEX | {"max_num_patches": most}
    processor, rng = reference(settings), random.Random(most)
    for size in [*NARROW, *((rng.randint(1, 700), rng.randint(1, 700)) for _ in range(30))]:
        check(settings, size, processor)


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": 14, "max_num_patches": 100},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.2, 0.3, 1]},
        {"do_convert_rgb": True},
        *({"resample": resample} for resample in range(6)),
    ],
    ids=str,
)
def test_switches_and_values_are_honoured(changes: dict[str, Any]) -> None:
    processor = reference(NAFLEX | changes)
    for size in ((1, 7), (90, 41), (300, 256)):
        check(NAFLEX | changes, size, processor)


def test_a_picture_may_keep_its_size() -> None:
    settings = NAFLEX | {"do_resize": False}
    for size in ((16, 16), (48, 160)):
        check(settings, size, reference(settings))
    with pytest.raises(ImageError, match="an image of 48 x 161 pixels does not divide into patches of 16"):
        naflex_pixels(picture(48, 161), preprocess_from_hf(settings))
    with pytest.raises(ImageError, match="does not divide"):
        naflex_pixels(picture(47, 160), preprocess_from_hf(settings))


# --- the file --------------------------------------------------------------------------------------------------------


def test_what_is_read() -> None:
    expected = Preprocess("naflex", resample=2, mean=(0.5,) * 3, std=(0.5,) * 3, patch_size=16, max_num_patches=256)
    assert preprocess_from_hf(NAFLEX) == expected
    # As transformers 4 wrote it, which named the keys that it had no use for.
    nulls = dict.fromkeys(["size", "crop_size", "do_center_crop", "default_to_square", "do_pad", "pad_size", "device"])
    for suffix in ("", "Fast", "Pil"):
        bare = {"image_processor_type": f"Siglip2ImageProcessor{suffix}"}
        assert preprocess_from_hf(bare) == preprocess_from_hf(bare | nulls) == expected
    check({"image_processor_type": "Siglip2ImageProcessor"}, (301, 250), reference({}))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"max_num_patchs": 9}, 'unknown key "max_num_patchs"; did you mean "max_num_patches"?'),
        ({"patch_size": 0}, "layout naflex needs a patch_size"),
        ({"patch_size": {"height": 16}}, "patch_size must be a whole number of at least 0, not {'height': 16}"),
        ({"max_num_patches": 0}, "max_num_patches must be positive"),
        ({"max_num_patches": 25.5}, "max_num_patches must be a whole number of at least 0, not 25.5"),
        ({"size": {"height": 9, "width": 9}}, "layout naflex takes a max_num_patches only"),
        ({"size": {"shortest_edge": 9}}, "layout naflex takes a max_num_patches only"),
        ({"do_center_crop": True, "crop_size": 9}, "layout naflex takes a max_num_patches only"),
        ({"do_resize": None, "do_normalize": "no"}, "do_normalize must be true or false, not 'no'"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], words: str) -> None:
    assert words in problem(NAFLEX | changes)


def test_what_cannot_be_built() -> None:
    with pytest.raises(ConfigError, match="layout naflex needs a patch_size"):
        Preprocess("naflex", max_num_patches=9)
    with pytest.raises(ConfigError, match="takes a max_num_patches only"):
        Preprocess("naflex", patch_size=9, max_num_patches=9, pad_to_square=True, mean=(0, 0, 0), std=(1, 1, 1))
    for name in ("patch_size", "max_num_patches"):
        with pytest.raises(ConfigError, match="patches need layout naflex"):
            Preprocess(**{name: 9})
    with pytest.raises(ConfigError, match="1000000 patches of 16 x 16 are more pixels than a picture may have"):
        naflex_pixels(picture(5, 5), preprocess_from_hf(NAFLEX | {"max_num_patches": 10**6}))
    with pytest.raises(ConfigError, match="layout must be naflex"):
        naflex_pixels(picture(5, 5), preprocess_from_hf(SIGLIP))
    with pytest.raises(ConfigError, match="layout must be single"):
        image_pixels(picture(5, 5), preprocess_from_hf(NAFLEX))


def test_pictures_that_are_refused() -> None:
    preprocess = preprocess_from_hf(NAFLEX)
    with pytest.raises(ImageError, match="no pixels"):
        naflex_pixels(Image.new("RGB", (5, 0)), preprocess)
    with pytest.raises(ImageError, match="is RGBA, not RGB"):
        naflex_pixels(Image.new("RGBA", (5, 5)), preprocess)
    # It would become 16 x 4096; but Pillow resizes the rows first, and that is 16 x 5,000,000 for a while.
    with pytest.raises(ImageError, match="an image of 1 x 5000000 pixels is too narrow to become 16 x 4096"):
        naflex_pixels(Image.new("RGB", (1, 5_000_000)), preprocess)
    assert naflex_pixels(Image.new("RGB", (5_000_000, 1)), preprocess).shape == (3, 16, 4096)
    with pytest.raises(ImageError, match="an image of 1500000 x 1 pixels is too narrow to become at most 1 patches"):
        naflex_pixels(Image.new("RGB", (1_500_000, 1)), Preprocess("naflex", patch_size=1, max_num_patches=1))


# --- with the encoder ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_features_of_a_picture(tmp_path: Path) -> None:
    """Through processor and model of transformers, padded, and through ours."""
    settings = NAFLEX | {"patch_size": 4, "max_num_patches": 40}
    theirs, processor = peer("SigLIP 2", tmp_path), reference(settings)
    encoder, preprocess = load_encoder(tmp_path), preprocess_from_hf(settings)
    images = [picture(*size) for size in ((64, 48), (30, 200), (1, 90), (33, 33))]
    expected = theirs(**processor(images, return_tensors="pt"))
    assert expected.last_hidden_state.abs().mean() > 0.3
    for i, image in enumerate(images):
        pixels = torch.from_numpy(naflex_pixels(image, preprocess))[None]
        count = encoder.config.num_tokens(*pixels.shape[2:])
        features = encoder(pixels)
        assert features.shape == (1, count, encoder.config.output_size) and count <= 40
        assert (features[0] - expected.last_hidden_state[i, :count]).abs().max() < 1e-4
        assert (encoder.pooled(pixels)[0] - expected.pooler_output[i]).abs().max() < 1e-4
