"""Published settings of image processors, pictures of every shape, and the errors that settings give."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llama_multimodal.config import preprocess_from_hf
from llama_multimodal.errors import ConfigError

HALF = [0.5, 0.5, 0.5]
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
ON = {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 0.00392156862745098}

SIGLIP = {
    **ON, "image_mean": HALF, "image_std": HALF, "image_processor_type": "SiglipImageProcessor",
    "processor_class": "SiglipProcessor", "resample": 3, "size": {"height": 224, "width": 224},
}  # fmt: skip
CLIP_336 = {
    "crop_size": 336, "do_center_crop": True, "do_normalize": True, "do_resize": True, "image_mean": CLIP_MEAN,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_std": CLIP_STD, "resample": 3, "size": 336,
}  # fmt: skip
DINOV2 = {
    **ON, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_convert_rgb": True,
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3,
    "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256},
}  # fmt: skip
LLAVA_15 = {
    **ON, "crop_size": {"height": 336, "width": 336}, "do_center_crop": True, "do_convert_rgb": True,
    "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_processor_type": "CLIPImageProcessor", "resample": 3,
    "processor_class": "LlavaProcessor", "size": {"shortest_edge": 336},
}  # fmt: skip
LLAVA_16 = {
    **LLAVA_15, "aspect_ratio_setting": "anyres", "do_pad": True, "image_processor_type": "LlavaNextImageProcessor",
    "processor_class": "LlavaNextProcessor",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}  # fmt: skip
SMOLVLM = {
    **ON, "do_convert_rgb": True, "do_image_splitting": True, "do_pad": True, "image_mean": HALF, "image_std": HALF,
    "image_processor_type": "Idefics3ImageProcessor", "max_image_size": {"longest_edge": 512}, "resample": 1,
    "processor_class": "Idefics3Processor", "size": {"longest_edge": 2048},
}  # fmt: skip
SMOLVLM2 = {
    **SMOLVLM, "image_processor_type": "SmolVLMImageProcessor", "processor_class": "SmolVLMProcessor",
    "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}},
}  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "google/siglip-base-patch16-224": SIGLIP,
    "google/siglip-so400m-patch14-384": {**SIGLIP, "size": {"height": 384, "width": 384}},
    "google/siglip2-base-patch16-512": {
        **SIGLIP, "do_convert_rgb": None, "resample": 2, "size": {"height": 512, "width": 512},
    },
    "openai/clip-vit-large-patch14-336": CLIP_336,
    "facebook/dinov2-base": DINOV2,
    "llava-hf/llava-1.5-7b-hf": LLAVA_15,
    "llava-hf/llava-v1.6-vicuna-7b-hf": LLAVA_16,
    "HuggingFaceTB/SmolVLM-256M-Instruct": SMOLVLM,
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": SMOLVLM2,
    "HuggingFaceM4/Idefics3-8B-Llama3": {
        **SMOLVLM, "max_image_size": {"longest_edge": 364}, "size": {"longest_edge": 1456},
    },
}  # fmt: skip

# One pixel thin, very wide, very tall, the targets and their neighbours, odd, large.
SHAPES = [
    (1, 1), (1, 2), (2, 1), (1, 12), (13, 1), (3, 33), (34, 3), (400, 30), (30, 401), (223, 224), (225, 224),
    (224, 224), (336, 336), (337, 335), (335, 672), (672, 336), (256, 257), (257, 599), (512, 512), (511, 513),
    (1008, 336), (640, 480), (481, 641), (1201, 399),
]  # fmt: skip


def shapes(number: int = 64, most: int = 420, seed: int = 0) -> list[tuple[int, int]]:
    """(width, height) of `number` pictures: those above, and random ones of every ratio."""
    rng = random.Random(seed)
    more = [(rng.randint(1, most), rng.randint(1, most)) for _ in range(number - len(SHAPES))]
    return SHAPES + more


@functools.cache
def picture(width: int, height: int) -> Image.Image:
    """Noise over a gradient: bytes from 0 to 255, so that a filter that is off shows."""
    noise = np.random.default_rng(width * 10_007 + height).integers(0, 128, (height, width, 3), np.uint8)
    ramp = np.linspace(0, 128, width).astype(np.uint8)[None, :, None]
    return Image.fromarray(noise + ramp)


def problem(settings: Mapping[str, Any]) -> str:
    """The one line that says what is wrong with them."""
    with pytest.raises(ConfigError) as caught:
        preprocess_from_hf(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)
