"""What plans say of each other: twice the batch, fewer bits, more GPUs; and what is refused."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest

from llama_multimodal.adapters.config import LoraConfig
from llama_multimodal.adapters.lora import apply_lora
from llama_multimodal.config import (
    Dinov2Config,
    MLPProjector,
    ModelConfig,
    SiglipConfig,
    TextConfig,
    TiledVisionConfig,
)
from llama_multimodal.errors import ConfigError
from llama_multimodal.models import build_model
from llama_multimodal.planning import GPUS, Packed, PlanOptions, plan
from llama_multimodal.planning.options import image_tokens, max_tiles
from llama_multimodal.planning.parameters import count_parameters
from llama_multimodal.quant.nf4 import quantize_nf4
from llama_multimodal.quant.pack import Packing, pack
from llama_multimodal.weights.checkpoint import build_on_meta
from llama_multimodal.zoo.configs import CONFIGS, find_config

LARGE = CONFIGS["meta-llama/Llama-3.2-11B-Vision-Instruct"]
TEXT = CONFIGS["meta-llama/Llama-3.1-8B-Instruct"]
SPLICED = ModelConfig(
    SiglipConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=64,
    patch_size=16, pooling_head=False),
    TextConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, cross_attention_layers=(), num_extra_embeddings=0, rope_scaling=None, bos_token_id=0,
        eos_token_ids=(1,), pad_token_id=0,
    ),
    255, MLPProjector(), fusion="splice", model_type="llama_multimodal",
)  # fmt: skip
TILED = ModelConfig(
    TiledVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_global_layers=1, num_attention_heads=2,
        image_size=28, intermediate_layers_indices=(0,),
    ),
    replace(SPLICED.text, cross_attention_layers=(1,), num_extra_embeddings=8), 256,
)  # fmt: skip
LLAVA = CONFIGS["llava-hf/llava-1.5-7b-hf"]


def part(config: Any, name: str, **options: Any) -> int:
    return plan(config, PlanOptions(**options)).part(name).bytes


def test_caches_grow_with_the_batch_and_the_context() -> None:
    for name in ("self-attention cache", "cross-attention cache", "text activations"):
        assert part(LARGE, name, context=1024, batch=6) == 2 * part(LARGE, name, context=1024, batch=3)
    once, twice = (part(LARGE, "self-attention cache", context=context) for context in (1024, 2048))
    assert twice == 2 * once == 2 * (2 * 32 * 1024 * 1024 * 2)  # keys and values, layers, tokens, width, bytes
    assert part(LARGE, "cross-attention cache", context=1024) == part(LARGE, "cross-attention cache", context=2048)
    assert part(LARGE, "cross-attention cache", tiles=4) == 2 * 8 * 4 * 1601 * 1024 * 2
    assert part(LARGE, "cross-attention cache", images=3, tiles=2) == 6 * part(LARGE, "cross-attention cache", tiles=1)
    assert part(LARGE, "cross-attention cache", images=0) == 0
    assert part(LARGE, "text activations", prompt=512) < part(LARGE, "text activations", prompt=1024)


def test_a_total_is_what_is_alive_at_once() -> None:
    for options in (PlanOptions(), PlanOptions(train="lora"), PlanOptions(train="full"), PlanOptions(device="cpu")):
        made = plan(LARGE, options)
        assert made.total == sum(part.at_peak for part in made.parts)
        assert all(0 <= part.at_peak <= part.bytes for part in made.parts)
        assert any(part.at_peak < part.bytes for part in made.parts)
        assert all(part.what and "\n" not in part.what for part in made.parts)


def test_weights_shrink_with_their_bits() -> None:
    plain = part(TEXT, "weights")
    assert plain == 2 * count_parameters(TEXT).total
    bf16, int8, int4 = (part(TEXT, "weights", pack=Packed(bits)) for bits in ("bf16", "int8", "int4"))
    assert int4 < int8 < bf16 == plain < part(TEXT, "weights", dtype="fp32")
    assert part(TEXT, "weights", pack=Packed("int8", symmetric=False)) > int8
    assert part(TEXT, "weights", pack=Packed("int4", group=128)) < int4
    assert int4 < part(TEXT, "weights", pack=Packed("int4", lm_head="int8")) < int8
    assert Packed.recommended("int4", TEXT.text) == Packed("int4", lm_head="int8")
    sparing = Packed.recommended("int4", LARGE.text)
    kept = part(LARGE, "weights", pack=sparing) - part(LARGE, "weights", pack=Packed("int4", lm_head="int8"))
    assert kept == 8 * (2 * 4096 * 4096 + 2 * 4096 * 1024) * (2 - 9 / 16)


def test_nf4_weights_are_as_large_as_bitsandbytes_makes_them() -> None:
    pytest.importorskip("bitsandbytes")
    for config in (SPLICED, TILED):
        model = quantize_nf4(build_model(config))
        tables = ("code", "nested_code", "nested_offset")  # of each layer, however large
        held = [*model.parameters(), *(value for name, value in model.named_buffers() if not name.endswith(tables))]
        wanted = sum(tensor.nbytes for tensor in held)
        found = part(config, "weights", dtype="fp32", pack=Packed("nf4"), train="lora")
        assert found == pytest.approx(wanted, rel=2e-3)
    assert part(LARGE, "text activations", pack=Packed("nf4"), train="lora") < part(
        LARGE, "text activations", pack=Packed("int4"), train="lora"
    )


@pytest.mark.parametrize("config", [SPLICED, TILED, LARGE, LLAVA, CONFIGS["HuggingFaceTB/SmolVLM-256M-Instruct"]])
def test_adapters_are_counted(config: Any) -> None:
    for targets in (("self", "mlp"), ("projector",), ("vision",), ("vision", "projector", "self")):
        model = apply_lora(build_on_meta(config), LoraConfig(rank=4, targets=targets))
        made = plan(config, PlanOptions(train="lora", rank=4, targets=targets))
        assert made.trained_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_adapters_of_the_encoder_keep_what_it_computes() -> None:
    sizes = [
        part(LARGE, "vision activations", train="lora", targets=targets)
        for targets in (("self",), ("self", "projector"), ("self", "vision"))
    ]
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[2] > part(LARGE, "vision activations", train="lora", targets=("vision",), gradient_checkpointing=True)


def test_parts_and_averages_in_training() -> None:
    count = count_parameters(LARGE)
    whole, halves = (part(LARGE, "weights", train="lora", tensor=tensor) for tensor in (1, 2))
    assert whole - halves == count.matrices + count.vision_matrices + count.projector  # half of them, of two bytes
    assert part(LARGE, "weights", train="lora", tensor=2, gpus=4) == halves // 4
    assert part(LARGE, "averaged weights", train="full", average=True) == 4 * count.total
    assert part(LARGE, "averaged weights", train="full") == 0


@pytest.mark.parametrize("bits", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_packed_weights_are_as_large_as_packing_makes_them(bits: str, tied: bool) -> None:
    import torch

    config = find_config("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert config is not None
    text = replace(config.text, num_hidden_layers=2, vocab_size=512, tie_word_embeddings=tied)
    config = replace(config, text=text)
    model = pack(build_model(config).to(torch.bfloat16), Packing(bits, symmetric=False))
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    packed = Packed(bits, symmetric=False)
    assert part(config, "weights", pack=packed, device="cpu", images=0) == sum(tensors.values())


def test_training() -> None:
    frozen, lora, full = (plan(TEXT, PlanOptions(context=512, train=train)) for train in (None, "lora", "full"))
    for name in ("optimizer", "gradients"):
        assert frozen.part(name).bytes == 0 < 50 * lora.part(name).bytes < full.part(name).bytes
    assert full.part("optimizer").bytes == 2 * full.part("gradients").bytes == 8 * full.parameters
    assert lora.trained_parameters == 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    more = plan(TEXT, PlanOptions(context=512, train="lora", rank=64))
    assert more.part("adapters").bytes == 4 * lora.part("adapters").bytes
    small = plan(TEXT, PlanOptions(context=512, train="full", optimizer="adamw8bit"))
    assert small.part("optimizer").bytes < full.part("optimizer").bytes / 3.8
    again = plan(TEXT, PlanOptions(context=512, train="full", gradient_checkpointing=True))
    assert again.part("text activations").bytes < full.part("text activations").bytes / 5
    several = plan(TEXT, PlanOptions(context=512, train="full", accumulate=True))
    assert several.total > full.total


def test_what_is_frozen_needs_no_gradient() -> None:
    full = plan(LARGE, PlanOptions(context=512, train="full"))
    parts = ("vision", "projector", "self", "cross", "embedding", "lm_head")
    others = [plan(LARGE, PlanOptions(context=512, train="full", freeze=(part,))) for part in parts]
    left = [full.trained_parameters - other.trained_parameters for other in others]
    assert min(left) > 0 and abs(sum(left) - full.trained_parameters) < 10_000  # but for the last norm
    still = plan(LARGE, PlanOptions(context=512, train="full", freeze=("vision",)))
    assert still.part("vision activations").bytes < full.part("vision activations").bytes / 4


def test_several_gpus() -> None:
    one, eight = (plan(LARGE, PlanOptions(context=2048, gpus=gpus)) for gpus in (1, 8))
    for name in ("self-attention cache", "cross-attention cache"):
        assert eight.part(name).bytes == one.part(name).bytes // 8
    whole = 2 * 128256 * 4096 * 2  # embedding and LM head
    assert whole < eight.part("weights").bytes < whole + one.part("weights").bytes / 7
    assert one.part("text activations").bytes / 4 < eight.part("text activations").bytes
    one, eight = (plan(LARGE, PlanOptions(context=2048, train="full", gpus=gpus)) for gpus in (1, 8))
    for name in ("weights", "optimizer", "gradients"):
        assert eight.part(name).bytes == one.part(name).bytes // 8
    assert eight.part("text activations").bytes == one.part("text activations").bytes
    assert eight.part("gathered weights").bytes > 0 == one.part("gathered weights").bytes


def test_kernels_spare_temporaries() -> None:
    for options in (PlanOptions(), PlanOptions(train="full"), PlanOptions(train="lora")):
        fused, plain = (plan(LARGE, replace(options, device=device)) for device in ("cuda", "cpu"))
        assert fused.part("text activations").bytes < plain.part("text activations").bytes


def test_pictures_take_places_or_a_cache() -> None:
    made = plan(LLAVA, PlanOptions(context=2048, images=2))
    assert made.part("image embeddings").bytes == 2 * 576 * 4096 * 2 and not made.part("cross-attention cache").bytes
    assert (max_tiles(LLAVA), max_tiles(CONFIGS["llava-hf/llava-v1.6-vicuna-7b-hf"])) == (1, 5)
    following = CONFIGS["llava-hf/llava-v1.6-vicuna-7b-hf"]
    assert isinstance(following, ModelConfig)
    assert image_tokens(following, 5, (336, 336)) == 5 * 576 + 4 * 24
    smol = CONFIGS["HuggingFaceTB/SmolVLM-Instruct"]
    assert isinstance(smol, ModelConfig) and image_tokens(smol, max_tiles(smol), (384, 384)) == 17 * 81


@pytest.mark.parametrize(
    "vision",
    [
        SiglipConfig(),
        SiglipConfig(pooling_head=False, layer=-2),
        Dinov2Config(num_register_tokens=4),
        Dinov2Config(swiglu=True, qkv_bias=False, hidden_size=384, num_attention_heads=6),
    ],
)
def test_parameters_of_encoders(vision: Any) -> None:
    import torch

    assert isinstance(LLAVA, ModelConfig)
    config = replace(LLAVA, vision=vision, model_type="llama_multimodal")
    with torch.device("meta"):
        built = sum(parameter.numel() for parameter in build_model(config).parameters())
    assert count_parameters(config).total == built
    assert plan(config, PlanOptions(context=1024)).total > 2 * built


def test_gpus() -> None:
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        named = int(gpu.name.split()[-2]) * 10**9
        assert 0.93 * named < gpu.memory * 2**30 < 1.08 * named
        assert (gpu.fits(gpu.usable), gpu.fits(gpu.usable + 1), gpu.fits(gpu.usable // 2)) == ("tight", "no", "yes")


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (TEXT, {"batch": 0}, "batch must be at least 1, not 0"),
    (TEXT, {"context": 200000}, "the model's context is 131072 tokens, and 200000 are asked for"),
    (TEXT, {"context": 8, "prompt": 9}, "a prompt of 9 tokens does not fit a context of 8"),
    (TEXT, {"dtype": "bf61"}, 'dtype is one of fp32, bf16, fp16, not "bf61"; did you mean "bf16"'),
    (TEXT, {"gpus": 3}, "3 GPUs do not divide the model's 32 query heads and 8 key heads and 14336 .*; take 1 or 2"),
    (TEXT, {"gpus": 16}, "16 GPUs do not divide the model's 8 key heads; take 1 or 2 or 4 or 8"),
    (TEXT, {"gpus": 2, "pack": Packed("int4")}, "packed weights are not divided"),
    (TEXT, {"images": 1}, "reads text only"),
    (TEXT, {"train": "full", "pack": Packed("int4")}, "packed weights are not trained"),
    (TEXT, {"train": "qlora"}, 'train is one of lora, full, not "qlora"; did you mean "lora"'),
    (TEXT, {"accumulate": True}, "accumulate is for training"),
    (TEXT, {"freeze": ("vision",)}, "freeze is for training in full"),
    (TEXT, {"train": "full", "freeze": ("visoin",)}, 'did you mean "vision"'),
    (TEXT, {"train": "lora", "targets": ("attention",)}, "targets is one of self, cross, mlp"),
    (TEXT, {"train": "lora", "targets": ()}, "LoRA needs a target"),
    (find_config("1B"), {"train": "full", "freeze": ("lm_head",)}, "freeze both of them or neither"),
    (TEXT, {"pack": Packed("int8", group=48)}, "4096 inputs of a layer do not divide into groups of 48"),
    (LARGE, {"tiles": 5}, "at most 4 tiles, not 5"),
    (LARGE, {"images": -1}, "images must be 0 or more"),
    (LARGE, {"image_size": (448, 448)}, "tiles have 560 × 560 pixels"),
    (LLAVA, {"context": 1024, "images": 2}, "2 pictures of 1 tiles take 1152 tokens of a prompt of 1024"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "options", "message"), BAD)
def test_what_is_refused(config: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(config, PlanOptions(**options))


def test_an_encoder_from_outside_is_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Outside(SiglipConfig):
        pass

    assert isinstance(LLAVA, ModelConfig)
    with pytest.raises(ConfigError, match="there is no plan for a Outside"):
        plan(replace(LLAVA, vision=Outside()))


def test_packed_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match='pack is one of bf16, int8, int4, nf4, not "int5"'):
        Packed("int5")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="groups of at least 1"):
        Packed("int8", group=0)
