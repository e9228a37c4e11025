"""SigLIP, CLIP and DINOv2: features against transformers at every layer and size, and what they refuse.

The reference runs on checkpoints that transformers wrote, with every bias, norm, table and layer scale random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_encoders import KINDS, NAFLEX, peer, pixels
from torch import Tensor

from llama_multimodal.config import ClipVisionConfig, Dinov2Config, EncoderConfig, SiglipConfig
from llama_multimodal.errors import ConfigError, ImageError
from llama_multimodal.models import Dinov2Encoder, SiglipEncoder, build_encoder
from llama_multimodal.weights.load_encoder import load_encoder

TOLERANCE = 1e-5


def reference(theirs: Any, images: Tensor, **options: Any) -> Any:
    # DINOv2 resizes positions without being asked.
    if "interpolate_pos_encoding" in options and "Dinov2" in type(theirs).__name__:
        del options["interpolate_pos_encoding"]
    with torch.inference_mode():
        return theirs(images, **options)


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_final_state_and_pooled(kind: str, tmp_path: Path) -> None:
    theirs = peer(kind, tmp_path)
    encoder = load_encoder(tmp_path)
    size = encoder.config.image_size
    images = pixels(size, size)
    expected, features = reference(theirs, images), encoder(images)
    assert expected.last_hidden_state.abs().mean() > 0.3
    assert difference(features, expected.last_hidden_state) < TOLERANCE
    assert features.shape == (2, encoder.config.num_tokens(size, size), encoder.config.output_size)
    if expected.pooler_output is None:
        with pytest.raises(ConfigError, match="no pooling head"):
            encoder.pooled(images)
    else:
        assert difference(encoder.pooled(images), expected.pooler_output) < TOLERANCE


@pytest.mark.parametrize("kind", ["SigLIP", "CLIP", "DINOv2, registers"])
@torch.inference_mode()
def test_every_hidden_state(kind: str, tmp_path: Path) -> None:
    """Counted as in transformers, from both ends; the pooled output is that of the final state all the same."""
    theirs, images = peer(kind, tmp_path), pixels(16, 16)
    expected = reference(theirs, images, output_hidden_states=True)
    assert len(expected.hidden_states) == 4
    for layer in range(-4, 4):
        encoder = load_encoder(tmp_path, layer=layer)
        assert difference(encoder(images), expected.hidden_states[layer]) < TOLERANCE, layer
        assert difference(encoder.pooled(images), expected.pooler_output) < TOLERANCE


@torch.inference_mode()
def test_clip_as_llava_reads_it(tmp_path: Path) -> None:
    theirs, images = peer("CLIP, whole", tmp_path), pixels(16, 16)
    encoder = load_encoder(tmp_path, layer=-2, with_class_token=False)
    expected = reference(theirs, images, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert difference(encoder(images), expected) < TOLERANCE
    assert encoder.config.num_tokens(16, 16) == 16


@pytest.mark.parametrize("with_class_token", [True, False])
@pytest.mark.parametrize("with_registers", [True, False])
@torch.inference_mode()
def test_tokens_that_dinov2_returns(with_class_token: bool, with_registers: bool, tmp_path: Path) -> None:
    theirs, images = peer("DINOv2, registers", tmp_path), pixels(16, 16)
    keep = [0] * with_class_token + [1, 2, 3] * with_registers + list(range(4, 20))
    encoder = load_encoder(tmp_path, with_class_token=with_class_token, with_registers=with_registers)
    expected = reference(theirs, images)
    assert difference(encoder(images), expected.last_hidden_state[:, keep]) < TOLERANCE
    assert difference(encoder.pooled(images), expected.pooler_output) < TOLERANCE
    assert encoder.config.num_tokens(16, 16) == len(keep)


# 8×32 has as many patches as the table has rows.
@pytest.mark.parametrize("size", [(32, 32), (8, 8), (8, 32), (20, 12), (4, 28)], ids=str)
@pytest.mark.parametrize("kind", ["SigLIP", "SigLIP, pixels left over", "CLIP", "DINOv2", "DINOv2, registers"])
@torch.inference_mode()
def test_other_sizes(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    theirs, encoder = peer(kind, tmp_path), load_encoder(tmp_path)
    images = pixels(*size)
    expected = reference(theirs, images, interpolate_pos_encoding=True).last_hidden_state
    assert difference(encoder(images), expected) < TOLERANCE
    assert expected.shape[1] == encoder.config.num_tokens(*size)


@pytest.mark.parametrize("kind", NAFLEX)
@torch.inference_mode()
def test_siglip2_of_variable_resolution(kind: str, tmp_path: Path) -> None:
    """transformers gets the images as one padded batch of patches; here each comes in its own size."""
    theirs, encoder = peer(kind, tmp_path), load_encoder(tmp_path)
    sizes = [(16, 16), (8, 28), (20, 12), (8, 8), (4, 32), (24, 24)]
    images = [pixels(height, width, images=1, seed=i) for i, (height, width) in enumerate(sizes)]
    longest = max(height * width // 16 for height, width in sizes)
    patches = torch.randn(len(sizes), longest, 48)
    mask = torch.zeros(len(sizes), longest, dtype=torch.int64)
    for i, image in enumerate(images):
        # [3, R, 4, C, 4] → [R, C, 4, 4, 3]
        cut = image[0].unflatten(2, (-1, 4)).unflatten(1, (-1, 4)).permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)
        patches[i, : len(cut)], mask[i, : len(cut)] = cut, 1
    grids = torch.tensor([(height // 4, width // 4) for height, width in sizes])
    expected = theirs(patches, pixel_attention_mask=mask, spatial_shapes=grids)
    for i, image in enumerate(images):
        count = encoder.config.num_tokens(*sizes[i])
        assert difference(encoder(image), expected.last_hidden_state[i : i + 1, :count]) < TOLERANCE, sizes[i]
        assert difference(encoder.pooled(image), expected.pooler_output[i : i + 1]) < TOLERANCE, sizes[i]


@pytest.mark.parametrize("kind", ["SigLIP", "CLIP", "DINOv2, SwiGLU", "DINOv2, registers", "SigLIP 2"])
@torch.inference_mode()
def test_bfloat16(kind: str, tmp_path: Path) -> None:
    peer(kind, tmp_path)
    exact, rounded = load_encoder(tmp_path), load_encoder(tmp_path, torch.bfloat16)
    for images in (pixels(16, 16), pixels(12, 20)):
        features = rounded(images)
        assert features.dtype == rounded.pooled(images).dtype == torch.bfloat16
        error = (features.float() - exact(images)).square().mean().sqrt() / exact(images).std()
        assert 0 < error < 0.03


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [False, True])
def test_positions_are_resized_in_fp32(mode: Any, antialias: bool) -> None:
    """In half precision too: the result is the fp32 one, rounded once."""
    config = SiglipConfig(
        hidden_size=24, num_attention_heads=3, num_hidden_layers=0, image_size=16, patch_size=4,
        position_mode=mode, position_antialias=antialias,
    )  # fmt: skip
    encoder = build_encoder(config)
    table = torch.randn(16, 24).bfloat16()
    assert torch.equal(encoder.resize(table, 3, 7), encoder.resize(table.float(), 3, 7).bfloat16())
    assert encoder.resize(table, 3, 7).shape == (21, 24)


TINY = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}
SMALL: dict[str, EncoderConfig] = {
    "SigLIP": SiglipConfig(**TINY),
    "CLIP": ClipVisionConfig(**TINY),
    "DINOv2": Dinov2Config(**TINY, num_register_tokens=2, swiglu=True),
}


@pytest.mark.parametrize("kind", SMALL)
def test_every_parameter_learns(kind: str) -> None:
    encoder = build_encoder(SMALL[kind])
    encoder(pixels(16, 16)).square().mean().backward()
    without = {name for name, value in encoder.named_parameters() if value.grad is None or not value.grad.any()}
    # What only the pooled output goes through; a bias of the keys moves all of a query's logits alike.
    without -= {name for name in without if name.startswith("head.") or "k_proj.bias" in name}
    assert without == ({"post_norm.weight", "post_norm.bias"} if kind == "CLIP" else set())


@pytest.mark.parametrize("kind", SMALL)
@torch.inference_mode()
def test_images_do_not_see_each_other(kind: str) -> None:
    encoder = build_encoder(SMALL[kind])
    images = pixels(16, 16, images=3)
    assert difference(encoder(images)[1:2], encoder(images[1:2])) < TOLERANCE
    assert encoder(images[:0]).shape == (0, encoder.config.num_tokens(16, 16), 24)


# --- sizes of released checkpoints -----------------------------------------------------------------------------------

SO400M = SiglipConfig(
    hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304, image_size=384,
    patch_size=14,
)  # fmt: skip
VIT_L_336 = ClipVisionConfig(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=336,
    patch_size=14,
)  # fmt: skip
GIANT = Dinov2Config(hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, image_size=518, swiglu=True)


@pytest.mark.parametrize(
    ("config", "parameters", "tokens"),
    # The giant has 1,136,480,768 with the token that stood for hidden patches in its training.
    [(SO400M, 428_225_600, 27**2), (VIT_L_336, 303_507_456, 577), (GIANT, 1_136_480_768 - 1536, 1370)],
    ids=["so400m", "ViT-L/14-336", "giant"],
)
def test_built_without_memory_at_real_sizes(config: EncoderConfig, parameters: int, tokens: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(config)
    assert sum(value.numel() for value in encoder.parameters()) == parameters
    assert encoder.config.num_tokens(config.image_size, config.image_size) == tokens


@pytest.mark.parametrize("config", [SO400M, VIT_L_336, GIANT], ids=["so400m", "ViT-L/14-336", "giant"])
def test_parameters_are_as_many_as_in_transformers(config: EncoderConfig) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        key: getattr(config, key)
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    }
    if isinstance(config, Dinov2Config):
        theirs = transformers.Dinov2Config(**sizes, use_swiglu_ffn=True)
    else:
        name = "SiglipVision" if isinstance(config, SiglipConfig) else "CLIPVision"
        theirs = getattr(transformers, f"{name}Config")(**sizes, intermediate_size=config.intermediate_size)
    with torch.device("meta"):
        ours, model = build_encoder(config), transformers.AutoModel.from_config(theirs)
    expected = sum(value.numel() for name, value in model.named_parameters() if "mask_token" not in name)
    assert sum(value.numel() for value in ours.parameters()) == expected


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 16, 18), (2, 3, 0, 16), (2, 3, 2, 16), (2, 1, 16, 16), (3, 16, 16)], ids=str)
def test_pixels_that_are_refused(shape: tuple[int, ...]) -> None:
    encoder = SiglipEncoder(SMALL["SigLIP"])  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"multiples of 4|\[images, 3, height, width\]"):
        encoder(torch.zeros(shape))
    with pytest.raises(ImageError, match="14×17 pixels does not divide into patches of 4; resize it to 16×16"):
        encoder.config.num_tokens(14, 17)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (SiglipConfig, {"hidden_act": "relu"}, '"relu" is not implemented; supported: gelu, gelu_pytorch_tanh, quick'),
        (SiglipConfig, {"num_attention_heads": 5}, "hidden_size must divide into the heads"),
        (SiglipConfig, {"patch_size": 0}, "patch_size must be at least 1"),
        (SiglipConfig, {"image_size": 8}, "image_size must be at least patch_size"),
        (ClipVisionConfig, {"layer": 13}, "layer must lie between -13 and 12, not 13"),
        (ClipVisionConfig, {"layer": -14}, "layer must lie between -13 and 12, not -14"),
        (Dinov2Config, {"position_mode": "nearest"}, '"nearest" is not implemented; supported: bicubic, bilinear'),
    ],
)
def test_configurations_that_are_refused(config: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**change)


def test_the_gated_block_is_two_thirds_as_wide() -> None:
    assert GIANT.intermediate_size == 4096 and Dinov2Config().intermediate_size == 3072
    assert Dinov2Config(hidden_size=20, num_attention_heads=2, swiglu=True).intermediate_size == 56
    assert Dinov2Encoder(SMALL["DINOv2"]).config.output_size == 24  # type: ignore[arg-type]
