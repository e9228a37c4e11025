"""Floors against what a model really multiplies, and against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llama_multimodal import ops
from llama_multimodal.cache import SelfAttentionCache
from llama_multimodal.config import LLAMA_3_2_11B_VISION, ModelConfig, TextConfig, TiledVisionConfig
from llama_multimodal.inputs import ImageLayout, ModelInputs
from llama_multimodal.models import build_model
from llama_multimodal.models.layers import Linear
from llama_multimodal.planning import Packed
from llama_multimodal.planning.gpus import GPUS, gpu_named
from llama_multimodal.planning.roofline import decode_floor, first_token_seconds, prefill_floor, vision_floor

TILES, PROMPT = 4, 24
SMALL = ModelConfig(
    vision=TiledVisionConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_global_layers=2, num_attention_heads=2,
        image_size=56, intermediate_layers_indices=(0, 2),
    ),
    text=TextConfig(
        hidden_size=128, intermediate_size=320, num_hidden_layers=5, cross_attention_layers=(1, 3),
        num_attention_heads=4, num_key_value_heads=2, vocab_size=512, max_position_embeddings=256,
    ),
    image_token_id=512,
)  # fmt: skip


def counted(run: Callable[[], Any]) -> int:
    """What torch counts; of attention it counts the plain products alone."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), ops.use_backend("torch"), counter:
        run()
    return counter.get_total_flops()


def inputs(tokens: int, tiles: int) -> ModelInputs:
    visible = torch.zeros(1, tokens, 2, dtype=torch.int64)
    visible[..., 1] = int(tiles > 0)
    layouts = (ImageLayout(2, tiles // 2),) if tiles else ()
    return ModelInputs(
        torch.zeros(1, tokens, dtype=torch.int64), torch.arange(tokens)[None], (tokens,),
        torch.randn(tiles, 3, 56, 56), layouts, visible,
    )  # fmt: skip


def test_operations_are_those_that_a_model_does() -> None:
    """Less what the attention's reference computes in vain: keys that a mask hides, padding of the encoder's tiles."""
    model = build_model(SMALL).eval()
    given = inputs(PROMPT, TILES)
    picture = counted(lambda: model.vision(given.tiles, given.images))  # type: ignore[operator]
    images = model.read_images(given)
    cache = SelfAttentionCache.allocate(SMALL.text, 1, PROMPT + 1, torch.float32, "cpu")
    reading = counted(lambda: model.read_images(given)) - picture  # projector, keys and values
    whole = counted(lambda: model(given, images=images, self_cache=cache, last_token_of=[PROMPT - 1]))
    projector = 2 * TILES * 17 * SMALL.vision.output_size * 128
    vision, prompt = vision_floor(SMALL, TILES).operations, prefill_floor(SMALL, prompt=PROMPT, tiles=TILES).operations
    assert 0.7 * (picture + projector) < vision <= picture + projector
    assert 0.9 * (whole + reading - projector) < prompt <= whole + reading - projector
    step = inputs(1, TILES)
    step.positions.fill_(PROMPT)
    decoded = counted(lambda: model(step, images=images, self_cache=cache))
    floor = decode_floor(SMALL, context=PROMPT + 1, tiles=TILES).operations
    assert 0.98 * decoded < floor <= decoded
    blind = counted(
        lambda: model(inputs(1, 0), self_cache=SelfAttentionCache.allocate(SMALL.text, 1, 1, torch.float32, "cpu"))
    )
    assert 0.98 * blind < decode_floor(SMALL, context=1).operations <= blind


def test_bytes_are_those_of_the_weights_that_take_part() -> None:
    with torch.device("meta"):
        model = build_model(LLAMA_3_2_11B_VISION)
    weights = {
        name: 2 * layer.weight.numel()
        for name, layer in model.decoder.named_modules()
        if isinstance(layer, Linear) and ".kv." not in name
    }
    cross = {f"layers.{i}." for i in LLAMA_3_2_11B_VISION.text.cross_attention_layers}
    text = sum(size for name, size in weights.items() if not any(name.startswith(part) for part in cross))
    keys = 2 * 1024 * 2  # a key and a value in bf16
    assert decode_floor(LLAMA_3_2_11B_VISION, context=0).bytes == text + 8192
    seeing = decode_floor(LLAMA_3_2_11B_VISION, rows=3, context=10, tiles=4).bytes
    assert seeing == sum(weights.values()) + 3 * (keys * (32 * 10 + 8 * 4 * 1601) + 8192)
    packings = [Packed.recommended(name, LLAMA_3_2_11B_VISION.text) for name in ("int8", "int4")]
    int8, int4 = (decode_floor(LLAMA_3_2_11B_VISION, packed, context=0).bytes for packed in packings)
    assert int8 - 8192 == text // 2 * 17 // 16  # a scale of two bytes for every 32
    head = 128256 * 4096
    assert int4 - 8192 == (text // 2 - head) * 9 // 16 + head * 17 // 16
    gates = 8 * 2 * 4096 * 4096  # queries and output of the gated blocks
    kept, rounded = (
        decode_floor(LLAMA_3_2_11B_VISION, packed, context=0, tiles=1).bytes
        for packed in (packings[1], replace(packings[1], keep_cross_attention=False))
    )
    assert kept - rounded == gates * 2 - gates * 9 // 16


def test_a_card_is_bound_by_what_takes_longer() -> None:
    h100 = next(gpu for gpu in GPUS if gpu.name.startswith("H100"))
    one, many = (decode_floor(LLAMA_3_2_11B_VISION, rows=rows, context=1) for rows in (1, 1000))
    assert one.seconds(h100) == one.bytes / 3350e9 > one.operations / 989e12
    assert many.seconds(h100) == many.operations / 989e12 > many.bytes / 3350e9
    assert 0.02 < first_token_seconds(LLAMA_3_2_11B_VISION, h100, prompt=64, tiles=4) < 0.05


@pytest.mark.parametrize(
    ("name", "memory", "found"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "H100 80 GB"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100 40 GB"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "A100 80 GB"),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX 4090 24 GB"),
        ("NVIDIA L40S", 44.4, "L40S 48 GB"),
        ("NVIDIA L4", 22.0, "L4 24 GB"),
        ("NVIDIA H200", 139.8, "H200 141 GB"),
        ("NVIDIA H100 PCIe", 79.1, None),
        ("NVIDIA GeForce RTX 4080", 15.7, None),
        ("NVIDIA GeForce RTX 3090 Ti", 23.6, None),
        ("NVIDIA GeForce RTX 4090 D", 23.6, None),
    ],
)
def test_cards_by_name(name: str, memory: float, found: str | None) -> None:
    gpu = gpu_named(name, memory)
    assert (gpu and gpu.name) == found
