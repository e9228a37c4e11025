"""Where the vision transformers' parameters lie in Hugging Face's checkpoints, and reading an encoder from a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import ClipVisionConfig, Dinov2Config, EncoderConfig, SiglipConfig, encoder_from_hf
from ..errors import CheckpointError, UserError
from ..models.encoders import build_encoder
from ..models.vit import ImageEncoder
from ..ops.huge_pages import empty_parameter
from .checkpoint import SafetensorsShards, Stored, check_tensors, on_meta, set_parameter
from .io import read_json
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

_PREFIXES = ("vision_model.", "dinov2_with_registers.", "dinov2.")
_NOT_OURS = ("text_model.", "logit_scale", "logit_bias", "text_projection.", "visual_projection.", "classifier.")
"""What whole models have besides the encoder, by how the names begin."""
_NOT_NEEDED = ("embeddings.position_ids", "embeddings.mask_token")
"""Within the encoder: a list of numbers in older files, and what stood for hidden patches in DINOv2's training."""
_LISTED = 20  # tensors named in one error


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


# --- reading ---------------------------------------------------------------------------------------------------------


def load_encoder(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    layer: int | None = None,
    with_class_token: bool = True,
    with_registers: bool = True,
) -> ImageEncoder:
    """Read an encoder from a Hugging Face folder, of the encoder or of a whole SigLIP or CLIP; weights are streamed.

    device: "meta" gives the encoder without its weights
    layer: the hidden state it returns, counted as transformers does (0 enters the blocks, -2 lies before the last one);
        None: the final one, as in `last_hidden_state`
    with_class_token, with_registers: whether these tokens are returned, where there are any

    Returns:
        The encoder in eval mode. SigLIP has its pooling head if the files hold one.

    Raises:
        CheckpointError: not there, damaged, or tensors that are missing, unknown or misshaped (one error lists them).
        ConfigError: a configuration that is damaged or asks for something unknown.
    """
    folder, place = Path(folder), torch.device(device)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    path = folder / "config.json"
    raw = read_json(path)
    try:
        config = encoder_from_hf(raw)
        if not isinstance(config, SiglipConfig):
            config = replace(config, with_class_token=with_class_token)
        if isinstance(config, Dinov2Config):
            config = replace(config, with_registers=with_registers)
        config = replace(config, layer=layer)
    except UserError as error:
        raise type(error)(f"{path}: {error}") from error
    store = SafetensorsShards(folder)
    prefix = _prefix(store.entries)
    if isinstance(config, SiglipConfig):
        config = replace(config, pooling_head=any(name.startswith(f"{prefix}head.") for name in store.entries))
    if config.num_hidden_layers > len(store.entries):
        layers, tensors = config.num_hidden_layers, len(store.entries)
        raise CheckpointError(f"{path} asks for {layers} layers, but there are only {tensors} tensors")
    with on_meta("an encoder"):
        encoder = build_encoder(config)
    shapes = {name: tuple(value.shape) for name, value in encoder.named_parameters()}
    rules = encoder_rules(config, prefix)
    found = {name: info for name, info in store.entries.items() if _is_ours(name, prefix)}
    check_tensors(folder, found, rules, shapes, {})
    for rule in rules:
        value = empty_parameter(shapes[rule.ours], dtype, place)
        if place.type != "meta":
            rule.read([Stored(store, name) for name in rule.theirs], value)
        set_parameter(encoder, rule.ours, value)
    return encoder.eval()


def _prefix(names: Iterable[str]) -> str:
    """What the encoder's names begin with: nothing in a checkpoint of it alone, written by transformers 5."""
    return next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in names)), "")


def _is_ours(name: str, prefix: str) -> bool:
    """Whether a tensor belongs to the encoder, rather than to what stands beside it in a checkpoint."""
    return not name.startswith(_NOT_OURS) and name not in {prefix + spare for spare in _NOT_NEEDED}
