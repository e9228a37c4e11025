from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from preprocess_for_tests import (
    CLIP_336,
    CLIP_MEAN,
    DINOV2,
    HALF,
    LLAVA_15,
    LLAVA_16,
    PUBLISHED,
    SIGLIP,
    SMOLVLM,
    SMOLVLM2,
    picture,
    problem,
    shapes,
)

from llama_multimodal.config import Preprocess, preprocess_from_hf
from llama_multimodal.errors import ConfigError, ImageError
from llama_multimodal.processing.preprocess import image_pixels

SINGLE = {name: raw for name, raw in PUBLISHED.items() if not {"max_image_size", "image_grid_pinpoints"} & raw.keys()}


def reference(settings: dict[str, Any]) -> Any:
    """The PIL processor of transformers that reads such a file."""
    pytest.importorskip("transformers")
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    kinds = {
        "BitImageProcessor": BitImageProcessorPil,
        "CLIPFeatureExtractor": CLIPImageProcessorPil,
        "CLIPImageProcessor": CLIPImageProcessorPil,
        "LlavaImageProcessor": LlavaImageProcessorPil,
        "SiglipImageProcessor": SiglipImageProcessorPil,
    }
    return kinds[settings.get("image_processor_type") or settings["feature_extractor_type"]].from_dict(settings)


def expected(processor: Any, image: Image.Image) -> npt.NDArray:
    return np.asarray(processor(image, return_tensors="np")["pixel_values"][0])


# --- equal to transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SINGLE)
def test_published_settings(name: str) -> None:
    processor, preprocess = reference(SINGLE[name]), preprocess_from_hf(SINGLE[name])
    # LLaVA 1.5 reads as CLIP does, below; a few pictures show that transformers takes it so, too.
    for size in shapes()[:: 6 if "llava" in name else 1]:
        image = picture(*size)
        before = image.tobytes()
        pixels = image_pixels(image, preprocess)
        assert pixels.dtype == np.float32 and pixels.shape == (3, *pixels.shape[1:])
        assert np.array_equal(pixels, expected(processor, image)), size
        assert image.tobytes() == before


SWITCHED: list[dict[str, Any]] = [
    {"do_resize": False},
    {"do_center_crop": False},
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"do_resize": False, "do_center_crop": False},
    {"do_resize": False, "do_center_crop": True, "crop_size": [50, 81]},
    {"size": {"height": 41, "width": 90}},
    {"size": [41, 90], "do_center_crop": False},
    {"size": 60, "crop_size": 51},
    {"size": 60, "default_to_square": True},
    {"rescale_factor": 1 / 127.5},
    {"image_mean": 0.4, "image_std": [0.2, 0.3, 1]},
    *({"resample": resample, "size": {"shortest_edge": 37}} for resample in range(6)),
]


@pytest.mark.parametrize("changes", SWITCHED, ids=str)
@pytest.mark.parametrize("settings", [SIGLIP, DINOV2], ids=["siglip", "dinov2"])
def test_switches_and_values_are_honoured(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    settings = settings | changes
    processor, preprocess = reference(settings), preprocess_from_hf(settings)
    for size in ((1, 7), (90, 41), (64, 48), (37, 111), (120, 99), (81, 50)):
        image = picture(*size)
        assert np.array_equal(image_pixels(image, preprocess), expected(processor, image)), size


@pytest.mark.parametrize("kind", ["SiglipImageProcessor", "CLIPImageProcessor", "BitImageProcessor"])
def test_missing_and_null_keys_are_the_kinds_own(kind: str) -> None:
    bare = {"image_processor_type": kind}
    nulls = bare | {key: None for key in [*SIGLIP, *DINOV2, "pad_size"] if key != "image_processor_type"}
    image = picture(301, 250)
    pixels = image_pixels(image, preprocess_from_hf(bare))
    assert np.array_equal(pixels, expected(reference(bare), image))
    assert preprocess_from_hf(bare) == preprocess_from_hf(nulls)


@pytest.mark.parametrize("pad", [True, False])
def test_llava_pads_to_a_square(pad: bool) -> None:
    settings = LLAVA_15 | {"image_processor_type": "LlavaImageProcessor", "do_pad": pad, "crop_size": 60, "size": 66}
    processor, preprocess = reference(settings), preprocess_from_hf(settings)
    for size in ((1, 40), (41, 2), (30, 30), (31, 30), (200, 77), (76, 201)):
        image = picture(*size)
        assert np.array_equal(image_pixels(image, preprocess), expected(processor, image)), size


def test_the_middle_of_a_small_picture_is_black_around() -> None:
    preprocess = Preprocess(crop=(4, 5), rescale_factor=None)
    pixels = image_pixels(Image.new("RGB", (2, 9), (7, 8, 9)), preprocess)
    assert pixels[:, 2].tolist() == [[0, 0, value, value, 0] for value in (7, 8, 9)]


# --- the file --------------------------------------------------------------------------------------------------------


def test_what_is_read() -> None:
    assert preprocess_from_hf(CLIP_336) == preprocess_from_hf(LLAVA_15)
    assert preprocess_from_hf(DINOV2).crop == (224, 224) and preprocess_from_hf(DINOV2).shortest_edge == 256
    assert preprocess_from_hf(LLAVA_16).layout == "anyres" and preprocess_from_hf(LLAVA_16).tile_size == 336
    smol = preprocess_from_hf(SMOLVLM)
    assert (smol.layout, smol.tile_size, smol.longest_edge, smol.split) == ("split", 512, 2048, True)
    assert preprocess_from_hf(SMOLVLM2) == smol  # its video keys do not concern pictures
    for suffix in ("Fast", "Pil"):
        assert preprocess_from_hf(SIGLIP | {"image_processor_type": f"SiglipImageProcessor{suffix}"}).size == (224, 224)


@pytest.mark.parametrize(
    "settings, words",
    [
        (SIGLIP | {"image_maen": HALF}, 'unknown key "image_maen"; did you mean "image_mean"?'),
        (SIGLIP | {"image_grid_pinpoints": [[1, 1]]}, 'unknown key "image_grid_pinpoints"'),
        (SIGLIP | {"image_processor_type": "SiglipImageProcesor"}, 'did you mean "SiglipImageProcessor"?'),
        (SIGLIP | {"image_processor_type": "ViTImageProcessor"}, "ViTImageProcessor is not implemented"),
        (SIGLIP | {"image_processor_type": None}, "there is no image_processor_type"),
        (SIGLIP | {"pad_size": {"height": 9, "width": 9}}, "pad_size is {'height': 9, 'width': 9}, which is not impl"),
        (SIGLIP | {"size": {"hieght": 9, "width": 9}}, 'size: unknown key "hieght"; did you mean "height"?'),
        (SIGLIP | {"size": {"max_height": 9, "max_width": 9}}, "size by max_height and max_width is not implemented"),
        (DINOV2 | {"size": {"shortest_edge": 9, "longest_edge": 99}}, "longest_edge and shortest_edge is not impl"),
        (SIGLIP | {"size": {}}, "size by nothing"),
        (SIGLIP | {"size": "224"}, "size must be a whole number of at least 0, not '224'"),
        (SIGLIP | {"size": 0}, "sizes must be positive"),
        (SIGLIP | {"size": {"longest_edge": 224}}, "longest_edge needs layout split"),
        (SIGLIP | {"do_center_crop": True}, "crop_size is missing"),
        (DINOV2 | {"crop_size": {"shortest_edge": 224}}, "crop_size is {'shortest_edge': 224}; it needs height and"),
        (SIGLIP | {"do_resize": 1}, "do_resize must be true or false, not 1"),
        (SIGLIP | {"rescale_factor": "1/255"}, "rescale_factor must be a number"),
        (SIGLIP | {"image_mean": [0.5, 0.5]}, "mean and std need a number for each of 3 channels"),
        (SIGLIP | {"image_std": [0.5, 0.5, 0]}, "std must be positive"),
        (SIGLIP | {"image_mean": ["a", 0.5, 0.5]}, "image_mean must be a number, not 'a'"),
        (SIGLIP | {"resample": 6}, "resample is 6; PIL's filters are 0 to 5"),
        (SIGLIP | {"resample": True}, "resample must be a whole number"),
        (LLAVA_16 | {"aspect_ratio_setting": "pad"}, "aspect_ratio_setting is 'pad'"),
        (LLAVA_16 | {"image_grid_pinpoints": [[336, 500]]}, "grid_pinpoints must be multiples of 336"),
        (LLAVA_16 | {"image_grid_pinpoints": []}, "grid_pinpoints must be multiples of 336"),
        (LLAVA_16 | {"image_grid_pinpoints": [336, 672]}, "must be a list of pairs [height, width], not [336, 672]"),
        (LLAVA_16 | {"size": {"shortest_edge": 224}}, "the crops must be squares that size and crop leave as they are"),
        (LLAVA_16 | {"size": 224, "do_resize": False}, "the crops must be squares that size and crop leave as they"),
        (LLAVA_16 | {"crop_size": [336, 224]}, "crop_size is 336 x 224; the crops of a grid must be square"),
        (SMOLVLM | {"size": {"shortest_edge": 2048}}, "layout split takes a longest_edge only"),
        (SMOLVLM | {"size": 2048}, "layout split takes a longest_edge only"),
        (SMOLVLM | {"do_center_crop": True, "crop_size": 9}, "layout split takes a longest_edge only"),
        (SMOLVLM | {"max_image_size": 512}, "max_image_size is 512; it needs a longest_edge"),
        (SMOLVLM2 | {"video_samplng": {}}, 'unknown key "video_samplng"; did you mean "video_sampling"?'),
    ],
)
def test_what_is_refused(settings: dict[str, Any], words: str) -> None:
    assert words in problem(settings)


def test_what_cannot_be_built() -> None:
    with pytest.raises(ConfigError, match="only one of"):
        Preprocess(size=(2, 2), shortest_edge=2)
    with pytest.raises(ConfigError, match="go together"):
        Preprocess(mean=tuple(CLIP_MEAN))
    with pytest.raises(ConfigError, match="needs a tile_size"):
        Preprocess(layout="split")
    with pytest.raises(ConfigError, match="needs the mean"):
        Preprocess(pad_to_square=True)
    with pytest.raises(ConfigError, match="layout must be single"):
        image_pixels(picture(5, 5), preprocess_from_hf(SMOLVLM))


# --- pictures that cannot be -----------------------------------------------------------------------------------------


def test_pictures_that_are_refused() -> None:
    siglip, clip = preprocess_from_hf(SIGLIP), preprocess_from_hf(CLIP_336)
    with pytest.raises(ImageError, match="no pixels"):
        image_pixels(Image.new("RGB", (0, 5)), siglip)
    with pytest.raises(ImageError, match="is L, not RGB"):
        image_pixels(Image.new("L", (5, 5)), siglip)
    with pytest.raises(ImageError, match="too narrow to become 336 x 336000"):
        image_pixels(Image.new("RGB", (1, 1000)), clip)
    # It would become 224 x 224; but Pillow resizes the rows first, and that is 224 x 400,000 for a while.
    with pytest.raises(ImageError, match="too narrow to become 224 x 224"):
        image_pixels(Image.new("RGB", (1, 400_000)), siglip)
    assert image_pixels(Image.new("RGB", (200_000, 1)), siglip).shape == (3, 224, 224)
    pad = preprocess_from_hf(LLAVA_15 | {"image_processor_type": "LlavaImageProcessor", "do_pad": True})
    with pytest.raises(ImageError, match="too large to pad to a square"):
        image_pixels(Image.new("RGB", (1, 9000)), pad)
