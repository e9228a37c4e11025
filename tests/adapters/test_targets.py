"""Which layers of each family a preset or a glob means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from small_model import CONFIG, random_model

from llama_multimodal import LoraConfig, from_parts
from llama_multimodal.adapters.targets import PRESETS, places, resolve
from llama_multimodal.config import (
    ClipVisionConfig,
    Dinov2Config,
    LanguageModelConfig,
    MLPProjector,
    ModelConfig,
    PixelShuffleProjector,
    SiglipConfig,
)
from llama_multimodal.errors import ConfigError
from llama_multimodal.models import LanguageModel
from llama_multimodal.quant.pack import pack
from llama_multimodal.weights.checkpoint import build_on_meta

VIT = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 32, "patch_size": 8,
    "intermediate_size": 40,
}  # fmt: skip
PLAIN = {key: value for key, value in VIT.items() if key != "intermediate_size"}  # which follows from the width
TEXT = replace(
    CONFIG.text, num_hidden_layers=2, cross_attention_layers=(), num_extra_embeddings=0, intermediate_size=64
)
SELF = ("attention.qkv.q_proj", "attention.qkv.k_proj", "attention.qkv.v_proj", "attention.o_proj")
CROSS = ("attention.q_proj", "attention.kv.k_proj", "attention.kv.v_proj", "attention.o_proj")
MLP = ("mlp.gate_up.gate_proj", "mlp.gate_up.up_proj", "mlp.down_proj")
VISION = (
    "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2",
)  # fmt: skip
SWIGLU = (*VISION[:4], "mlp.gate_up", "mlp.down_proj")


def in_layers(stack: str, numbers: Iterable[int], layers: Iterable[str]) -> set[str]:
    return {f"{stack}.{i}.{layer}" for i in numbers for layer in layers}


def decoder(numbers: Iterable[int], layers: Iterable[str]) -> set[str]:
    return in_layers("decoder.layers", numbers, layers)


def spliced(vision: object, model_type: str, projector: object) -> LanguageModel:
    config = ModelConfig(
        vision=vision,  # type: ignore[arg-type]
        text=TEXT,
        image_token_id=5,
        projector=projector,  # type: ignore[arg-type]
        fusion="splice",
        model_type=model_type,
    )
    return build_on_meta(config)


def assembled(vision: object, fusion: str = "cross_attention", projector: str = "mlp") -> LanguageModel:
    return from_parts(vision, TEXT, fusion=fusion, projector=projector)[0]  # type: ignore[arg-type]


MLLAMA = {
    "self": decoder((0, 2, 4), SELF),
    "cross": decoder((1, 3), CROSS),
    "mlp": decoder(range(5), MLP),
    "vision": in_layers("vision.layers", range(3), VISION) | in_layers("vision.global_layers", range(2), VISION),
    "projector": {"projector"},
}
TEXT_ONLY = {"self": decoder(range(2), SELF), "mlp": decoder(range(2), MLP)}
TWO = {"projector": {"projector.fc1", "projector.fc2"}}
FAMILIES: dict[str, tuple[LanguageModel, dict[str, set[str]]]] = {
    "mllama": (build_on_meta(CONFIG), MLLAMA),
    "llama": (build_on_meta(LanguageModelConfig(TEXT)), TEXT_ONLY),
    # LLaVA reads the state before the last block, which therefore never runs.
    "llava": (
        spliced(ClipVisionConfig(**VIT, layer=-2), "llava", MLPProjector()),
        {**TEXT_ONLY, **TWO, "vision": in_layers("vision.layers", range(2), VISION)},
    ),
    "llava, SigLIP": (
        spliced(SiglipConfig(**VIT), "llava", MLPProjector()),
        {**TEXT_ONLY, **TWO, "vision": in_layers("vision.layers", range(3), VISION)},
    ),
    **{
        kind: (
            spliced(SiglipConfig(**VIT, pooling_head=False), kind, PixelShuffleProjector()),
            {
                **TEXT_ONLY,
                "projector": {"projector.proj"},
                "vision": in_layers("vision.layers", range(3), VISION),
            },
        )
        for kind in ("idefics3", "smolvlm")
    },
    "SigLIP + Llama": (
        assembled(SiglipConfig(**VIT)),
        {
            **TWO,
            "self": decoder((0, 1), SELF),
            "cross": decoder((2,), CROSS),
            "mlp": decoder(range(3), MLP),
            "vision": in_layers("vision.layers", range(3), VISION),
        },
    ),
    "CLIP + Llama": (
        assembled(ClipVisionConfig(**VIT), "splice", "linear"),
        {**TEXT_ONLY, "projector": {"projector"}, "vision": in_layers("vision.layers", range(3), VISION)},
    ),
    "DINOv2 + Llama": (
        assembled(Dinov2Config(**PLAIN), "splice"),
        {**TEXT_ONLY, **TWO, "vision": in_layers("vision.layers", range(3), VISION)},
    ),
    "DINOv2 with SwiGLU + Llama": (
        assembled(Dinov2Config(**PLAIN, swiglu=True), "splice"),
        {**TEXT_ONLY, **TWO, "vision": in_layers("vision.layers", range(3), SWIGLU)},
    ),
    "no projector": (
        assembled(SiglipConfig(**{**VIT, "hidden_size": 32, "num_attention_heads": 2}), projector="identity"),
        {
            "self": decoder((0, 1), SELF),
            "cross": decoder((2,), CROSS),
            "mlp": decoder(range(3), MLP),
            "vision": in_layers("vision.layers", range(3), VISION),
        },
    ),
}


def resolved(model: LanguageModel, *targets: str) -> set[str]:
    return set(resolve(model, LoraConfig(targets=targets)))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_each_preset_means(family: str) -> None:
    model, expected = FAMILIES[family]
    for preset in PRESETS:
        if preset == "all-linear":
            assert resolved(model, preset) == set().union(*expected.values())
        elif preset in expected:
            assert resolved(model, preset) == expected[preset], preset
        else:
            with pytest.raises(ConfigError, match=f'no layers for the target "{preset}"; it has self, '):
                resolved(model, preset)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_that_can_carry_one_is_a_linear_layer_of_that_shape(family: str) -> None:
    model, _ = FAMILIES[family]
    for path, place in places(model).items():
        weight = model.get_parameter(f"{path}.weight")
        assert tuple(weight.shape) == place.shape, path


def test_packing_does_not_move_a_layer() -> None:
    model = random_model()
    before = [(path, place.shape, place.group, place.reads_images) for path, place in places(model).items()]
    pack(model, "bf16")
    after = [(path, place.shape, place.group, place.reads_images) for path, place in places(model).items()]
    assert after == before and len(before) == 67


def test_which_layers_read_images() -> None:
    reading = {path for path, place in places(build_on_meta(CONFIG)).items() if place.reads_images}
    keys = decoder((1, 3), ("attention.kv.k_proj", "attention.kv.v_proj"))
    assert reading == MLLAMA["vision"] | MLLAMA["projector"] | keys


def test_globs() -> None:
    model = build_on_meta(CONFIG)
    assert resolved(model, "decoder.layers.0.mlp.down_proj") == {"decoder.layers.0.mlp.down_proj"}
    assert resolved(model, "decoder.layers.2") == decoder((2,), (*SELF, *MLP))
    assert resolved(model, "qkv", "kv") == decoder((0, 2, 4), SELF[:3]) | decoder((1, 3), CROSS[1:3])
    assert resolved(model, "vision.layers.[01].mlp.fc?") == in_layers("vision.layers", range(2), VISION[4:])
    assert resolved(model, "down_proj") == decoder(range(5), MLP[2:])
    assert resolved(model, "decoder.*") == MLLAMA["self"] | MLLAMA["cross"] | MLLAMA["mlp"]
    assert resolved(model, "cross", "projector") == MLLAMA["cross"] | MLLAMA["projector"]
    whole = LoraConfig(targets="self")
    assert set(resolve(model, whole)) == MLLAMA["self"]


def test_the_lm_head_only_by_its_name() -> None:
    model = build_on_meta(CONFIG)
    assert "decoder.lm_head" not in resolved(model, "all-linear", "*", "decoder", "decoder.*")
    assert resolved(model, "lm_head") == resolved(model, "decoder.lm_head") == {"decoder.lm_head"}


@pytest.mark.parametrize("target", ["patch_embedding", "vision.head.in_proj", "norm", "input_norm"])
def test_layers_that_carry_none(target: str) -> None:
    model, _ = FAMILIES["llava, SigLIP"]
    assert any(path.endswith(target) for path, _ in model.named_modules())
    with pytest.raises(ConfigError, match="means no layer of this model"):
        resolved(model, target)


def test_what_is_never_read_only_by_its_name() -> None:
    """Adapters that PEFT trained on every linear layer have it too."""
    model, _ = FAMILIES["llava"]
    assert resolved(model, "vision.layers.2") == in_layers("vision.layers", (2,), VISION)
    model, _ = FAMILIES["llava, SigLIP"]
    assert resolved(model, "vision.head") == {f"vision.head.{x}" for x in ("o_proj", "mlp.fc1", "mlp.fc2")}


def test_a_target_that_means_nothing_names_the_nearest() -> None:
    model = build_on_meta(CONFIG)
    for wrong, near in {
        "q_porj": "q_proj",
        "corss": "cross",
        "decoder.layers.9.mlp.down_proj": r"decoder\.layers\.\d",
    }.items():
        with pytest.raises(ConfigError, match=f'"{wrong}" means no layer of this model; did you mean "{near}'):
            resolved(model, "self", wrong)
    with pytest.raises(ConfigError, match="means no layer of this model; presets are self, cross, mlp, vision"):
        resolved(model, "zzz")


def test_ranks_and_alphas_by_glob() -> None:
    model = build_on_meta(CONFIG)
    config = LoraConfig(
        rank=8,
        alpha=16,
        targets="self",
        rank_pattern={"layers.2.*.q_proj": 2, "q_proj": 4},
        alpha_pattern={"layers.4": 3},
    )
    found = {path: (rank, alpha) for path, (_, rank, alpha) in resolve(model, config).items()}
    assert found["decoder.layers.0.attention.qkv.q_proj"] == (4, 16)
    assert found["decoder.layers.2.attention.qkv.q_proj"] == (2, 16)
    assert found["decoder.layers.4.attention.qkv.q_proj"] == (4, 3)
    assert found["decoder.layers.4.attention.o_proj"] == (8, 3)
    assert found["decoder.layers.0.attention.o_proj"] == (8, 16)
    for wrong in ({"rank_pattern": {"down_proj": 2}}, {"alpha_pattern": {"o_porj": 2.0}}):
        with pytest.raises(ConfigError, match="gives a rank or alpha for no target"):
            resolve(model, replace(config, **wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "ranks must be whole numbers of at least 1"),
        ({"rank": 1.5}, "ranks must be whole numbers"),
        ({"rank": True}, "ranks must be whole numbers"),
        ({"rank_pattern": {"q_proj": 0}}, "ranks must be whole numbers"),
        ({"alpha": float("nan")}, "alpha must be finite"),
        ({"alpha": "x"}, "alpha must be finite"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"targets": ()}, "targets must name at least one preset or glob"),
        ({"targets": ("self", "")}, "targets must name at least one"),
        ({"dtype": "int8"}, 'dtype "int8" is not one of float32, model'),
    ],
)
def test_configurations_that_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**given)  # type: ignore[arg-type]
