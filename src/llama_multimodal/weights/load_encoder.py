"""Reading a vision encoder alone, from a folder of it or of a whole SigLIP or CLIP."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from ..config import Dinov2Config, SiglipConfig, encoder_from_hf
from ..errors import CheckpointError, UserError
from ..models.parts import build_encoder
from ..models.vit import ImageEncoder
from ..ops.huge_pages import empty_parameter
from .checkpoint import SafetensorsShards, Stored, check_tensors, on_meta, set_parameter
from .encoders import encoder_rules
from .io import read_json

_PREFIXES = ("vision_model.", "dinov2_with_registers.", "dinov2.")
_NOT_OURS = ("text_model.", "logit_scale", "logit_bias", "text_projection.", "visual_projection.", "classifier.")
"""What whole models have besides the encoder, by how the names begin."""


def load_encoder(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    layer: int | None = None,
    with_class_token: bool = True,
    with_registers: bool = True,
    pooling_head: bool = True,
) -> ImageEncoder:
    """Read an encoder from a Hugging Face folder, of the encoder or of a whole SigLIP or CLIP; weights are streamed.

    device: "meta" gives the encoder without its weights
    layer: the hidden state it returns, counted as transformers does (0 enters the blocks, -2 lies before the last one);
        None: the final one, as in `last_hidden_state`
    with_class_token, with_registers: whether these tokens are returned, where there are any
    pooling_head: whether SigLIP keeps its pooling head, if the files hold one

    Returns:
        The encoder in eval mode.

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
    left_out: tuple[str, ...] = _NOT_OURS
    if isinstance(config, SiglipConfig):
        head = pooling_head and any(name.startswith(f"{prefix}head.") for name in store.entries)
        config = replace(config, pooling_head=head)
        left_out += () if head else (f"{prefix}head.",)
    if config.num_hidden_layers > len(store.entries):
        layers, tensors = config.num_hidden_layers, len(store.entries)
        raise CheckpointError(f"{path} asks for {layers} layers, but there are only {tensors} tensors")
    with on_meta("an encoder"):
        encoder = build_encoder(config)
    shapes = {name: tuple(value.shape) for name, value in encoder.named_parameters()}
    rules = encoder_rules(config, prefix)
    found = {name: info for name, info in store.entries.items() if not name.startswith(left_out)}
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
