"""Where the vision transformers' parameters lie in Hugging Face's checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from ..config import ClipVisionConfig, Dinov2Config, EncoderConfig, SiglipConfig
from .rules import Rename, Rule, reshape

# Ours → theirs, modules that have a weight and a bias.
_BLOCK = {  # SigLIP and CLIP
    "attention_norm": "layer_norm1",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_HEAD = {"o_proj": "attention.out_proj", "norm": "layernorm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_DINOV2_BLOCK = {"attention_norm": "norm1", "attention.o_proj": "attention.output.dense", "mlp_norm": "norm2"}
_DINOV2_QKV = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}  # with or without a bias
_DINOV2_MLP = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_DINOV2_SWIGLU = {"mlp.gate_up": "mlp.weights_in", "mlp.down_proj": "mlp.weights_out"}
_DINOV2_SCALES = {"attention_scale": "layer_scale1.lambda1", "mlp_scale": "layer_scale2.lambda1"}  # parameters


def encoder_rules(config: EncoderConfig, theirs: str = "", ours: str = "") -> list[Rule]:
    """Every parameter's place in Hugging Face's layout.

    theirs, ours: what the names begin with, dot included: theirs is `vision_model.` in a whole SigLIP or CLIP
    """
    rules = _dinov2(config) if isinstance(config, Dinov2Config) else _siglip_and_clip(config)
    return [replace(rule, ours=ours + rule.ours, theirs=(theirs + rule.theirs[0],)) for rule in rules]


def _siglip_and_clip(config: SiglipConfig | ClipVisionConfig) -> Iterator[Rename]:
    size = config.hidden_size
    if isinstance(config, ClipVisionConfig):
        yield Rename("class_embedding", ("embeddings.class_embedding",))
        yield from _both("pre_norm", "pre_layrnorm")  # spelled so in every checkpoint
    else:
        yield Rename("patch_embedding.bias", ("embeddings.patch_embedding.bias",))
    last = isinstance(config, SiglipConfig) and config.channels_last
    views = _channels_last(config) if last else _convolution(config)
    yield Rename("patch_embedding.weight", ("embeddings.patch_embedding.weight",), views, reshaped=last)
    yield Rename("position_embedding", ("embeddings.position_embedding.weight",))
    for i in range(config.num_hidden_layers):
        for a, b in _BLOCK.items():
            yield from _both(f"layers.{i}.{a}", f"encoder.layers.{i}.{b}")
    yield from _both("post_norm", "post_layernorm")
    if isinstance(config, SiglipConfig) and config.pooling_head:
        yield Rename("head.probe", ("head.probe",), reshape(1, 1, size))
        for x in ("weight", "bias"):
            yield Rename(f"head.in_proj.{x}", (f"head.attention.in_proj_{x}",))
        for a, b in _HEAD.items():
            yield from _both(f"head.{a}", f"head.{b}")


def _dinov2(config: Dinov2Config) -> Iterator[Rename]:
    size, registers = config.hidden_size, config.num_register_tokens
    yield Rename("class_embedding", ("embeddings.cls_token",), reshape(1, 1, size))
    if registers:
        yield Rename("register_embedding", ("embeddings.register_tokens",), reshape(1, registers, size))
    patches = "embeddings.patch_embeddings.projection"
    yield Rename("patch_embedding.weight", (f"{patches}.weight",), _convolution(config))
    yield Rename("patch_embedding.bias", (f"{patches}.bias",))
    yield Rename("position_embedding", ("embeddings.position_embeddings",), reshape(1, -1, size))
    for i in range(config.num_hidden_layers):
        block, theirs = f"layers.{i}", f"encoder.layer.{i}"
        for a, b in (_DINOV2_BLOCK | (_DINOV2_SWIGLU if config.swiglu else _DINOV2_MLP)).items():
            yield from _both(f"{block}.{a}", f"{theirs}.{b}")
        for a, b in _DINOV2_QKV.items():
            names = f"{block}.attention.{a}", f"{theirs}.attention.attention.{b}"
            yield from _both(*names) if config.qkv_bias else [Rename(f"{names[0]}.weight", (f"{names[1]}.weight",))]
        for a, b in _DINOV2_SCALES.items():
            yield Rename(f"{block}.{a}", (f"{theirs}.{b}",))
    yield from _both("post_norm", "layernorm")


def _both(ours: str, theirs: str) -> Iterator[Rename]:
    """Weight and bias of a module."""
    for x in ("weight", "bias"):
        yield Rename(f"{ours}.{x}", (f"{theirs}.{x}",))


def _convolution(config: EncoderConfig) -> Callable[[Tensor], list[Tensor]]:
    return reshape(config.hidden_size, config.num_channels, config.patch_size, config.patch_size)


def _channels_last(config: EncoderConfig) -> Callable[[Tensor], list[Tensor]]:
    """A patch's pixels lie in the order row, column, channel in theirs; channels come first in ours."""
    views = _convolution(config)
    return lambda ours: [views(ours)[0].permute(0, 2, 3, 1)]
