"""`from_parts`: a vision-language model put together from an encoder, a projector and a text model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import (
    PROJECTORS,
    VISION,
    ClipVisionConfig,
    Dinov2Config,
    Fusion,
    LanguageModelConfig,
    ModelConfig,
    Preprocess,
    ProjectorConfig,
    SiglipConfig,
    TextConfig,
    TiledVisionConfig,
    VisionConfig,
    nearest,
)
from .config.assembled import ASSEMBLED
from .errors import CheckpointError, ConfigError
from .loading import load, locate, pick_device, pick_dtype, read_text
from .models import VisionLanguageModel
from .models.llama import CrossAttentionBlock, LlamaDecoder
from .models.parts import build_projector, build_vision
from .ops.huge_pages import empty_parameter
from .processing.preprocess import load_preprocess
from .processing.processor import Processor
from .processing.template import ChatTemplate
from .processing.tokenizer import IMAGE_TOKEN, Tokenizer
from .weights.checkpoint import Checkpoint, build_on_meta, open_checkpoint, set_parameter
from .weights.load_encoder import load_encoder
from .zoo.configs import ASSEMBLED as KNOWN_PARTS
from .zoo.configs import PRESETS

PLACEHOLDER = "<image>"
"""Added to a tokenizer that has no token for an image."""


def from_parts(
    vision: str | Path | VisionConfig | TiledVisionConfig,
    text: str | Path | TextConfig,
    *,
    fusion: Fusion = "cross_attention",
    projector: str | ProjectorConfig = "mlp",
    cross_attention_layers: Sequence[int] | None = None,
    vision_layer: int | None = None,
    class_token: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> tuple[VisionLanguageModel, Processor]:
    """Put a model together. Parts that come from checkpoints keep their weights; the rest is new and wants training.

    Fresh gated blocks are closed, and a projector's output is all that splicing adds: on text alone the result gives
    exactly what the text model gives. New weights are drawn by torch's generator, so `torch.manual_seed` repeats them.

    vision: a folder or a hub id of SigLIP, CLIP or DINOv2, or a configuration for a new encoder
    text: a folder, a GGUF file or a hub id of a Llama text model, or a configuration for a new decoder
    projector: "linear", "mlp", "pixel_shuffle", "identity", a registered name, or a configuration
    cross_attention_layers: where in the stack the gated blocks lie, counted with them; None puts one behind the first
        three blocks and then behind every four, as Llama 3.2 Vision has them
    vision_layer: the hidden state of the encoder that is read (-2: before the last block); None: the final one
    class_token: read CLIP's or DINOv2's class token too, and DINOv2's registers
    dtype: None takes the text checkpoint's, or float32

    Returns:
        The model in eval mode, and a processor with the text model's tokenizer and the encoder's preprocessing.

    Raises:
        CheckpointError: a part is not there, is damaged, or is no such part.
        ConfigError: parts that do not fit each other; the message says which would.
        DeviceError: the dtype or the device is not there.
    """
    place, kind = pick_device(device), pick_dtype(dtype)
    source = _open_text(text)
    if kind is None:
        kind = torch.float32 if source.checkpoint is None else source.checkpoint.dtype
    encoder, preprocess = _vision(vision, kind, place, vision_layer, class_token)
    image_token_id, extra, tokenizer = _image_token(source)
    layers = () if fusion == "splice" else _schedule(source.config, cross_attention_layers)
    if fusion == "splice" and cross_attention_layers:
        raise ConfigError("splice fusion has no cross-attention layers; leave them out, or take cross_attention")
    decoder = replace(
        source.config,
        num_hidden_layers=source.config.num_hidden_layers + len(layers),
        cross_attention_layers=layers,
        num_extra_embeddings=extra,
    )
    config = ModelConfig(
        vision=encoder if not isinstance(encoder, nn.Module) else encoder.config,  # type: ignore[arg-type]
        text=decoder,
        image_token_id=image_token_id,
        projector=_projector(projector),
        fusion=fusion,
        model_type=ASSEMBLED,
    )
    model = build_on_meta(config)
    assert isinstance(model, VisionLanguageModel)
    with torch.no_grad(), place:  # new parts are made where they are wanted, and take nothing on the meta device
        new = encoder if isinstance(encoder, nn.Module) else build_vision(encoder)
        model.vision = new.to(place, kind)
        widths = config.vision.output_size, decoder.hidden_size
        model.projector = build_projector(config.projector, *widths).to(place, kind)
        if source.checkpoint is None:
            model.decoder = LlamaDecoder(decoder).to(place, kind)
        else:
            _read_decoder(model, source.checkpoint, kind, place)
    return model.eval(), Processor(config, tokenizer, source.template, preprocess)


def from_preset(
    size: str, *, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
) -> tuple[VisionLanguageModel, Processor]:
    """A vision-language model by its size: "1B" and "3B" are put together from SigLIP so400m and Llama 3.2, and want
    training before they see; "11B" and "90B" are Llama 3.2 Vision.

    Raises:
        ConfigError: no such size. CheckpointError: its parts are neither here nor to be had.
    """
    name = PRESETS.get(size.upper())
    if name is None:
        raise ConfigError(f'there is no preset "{size}"; known: {", ".join(PRESETS)}')
    if name in KNOWN_PARTS:
        return from_parts(*KNOWN_PARTS[name], dtype=dtype, device=device)
    model, processor = load(name, dtype=dtype, device=device)
    assert isinstance(model, VisionLanguageModel)
    return model, processor


# --- the text model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    config: TextConfig
    checkpoint: Checkpoint | None = None
    tokenizer: Tokenizer | None = None
    template: ChatTemplate | None = None


def _open_text(text: str | Path | TextConfig) -> _Text:
    if isinstance(text, TextConfig):
        if text.cross_attention_layers or text.num_extra_embeddings:
            raise ConfigError("text: a decoder for text alone is wanted, without cross-attention layers or extra rows")
        return _Text(text)
    checkpoint = open_checkpoint(locate(text))
    if not isinstance(checkpoint.config, LanguageModelConfig):
        raise CheckpointError(f"{text} reads images already; give a text model, such as Llama 3.2 1B")
    if checkpoint.packed:
        raise CheckpointError(f"{text} holds packed weights; give the checkpoint that it was made from")
    return _Text(checkpoint.config.text, checkpoint, *read_text(checkpoint))


def _image_token(source: _Text) -> tuple[int, int, Tokenizer | None]:
    """The id that stands for an image, how many rows the embedding needs for it, and the tokenizer that knows it."""
    size, tokenizer = source.config.vocab_size, source.tokenizer
    if tokenizer is None:
        return size, 1, None
    for name in (PLACEHOLDER, IMAGE_TOKEN):
        token = tokenizer.special_tokens.get(name)
        if token is not None and token <= size:
            return token, int(token == size), tokenizer
    tokenizer, token = tokenizer.with_special(PLACEHOLDER)
    if token > size:
        raise CheckpointError(f"the tokenizer has {token} tokens, and the text model's embedding has {size} rows")
    return token, int(token == size), tokenizer


def _schedule(config: TextConfig, given: Sequence[int] | None) -> tuple[int, ...]:
    if given is None:
        return usual_cross_attention_layers(config.num_hidden_layers)
    if not given:
        raise ConfigError("cross_attention_layers is empty, and cross-attention fusion needs at least one")
    return tuple(given)


def usual_cross_attention_layers(num_self_attention_layers: int) -> tuple[int, ...]:
    """Where gated blocks lie among so many others, as in Llama 3.2 Vision: behind the first three, then every four."""
    count = max(num_self_attention_layers // 4, 1)
    return tuple(min(3, num_self_attention_layers) + 5 * i for i in range(count))


def _read_decoder(model: VisionLanguageModel, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    """The text model's weights at their new places, and fresh gated blocks between them."""
    config = model.config.text
    for layer in config.cross_attention_layers:
        model.decoder.layers[layer] = CrossAttentionBlock(config).to(device, dtype)
    for rule in checkpoint.rules:
        name = _moved(rule.ours, config)
        value = empty_parameter(tuple(model.get_parameter(name).shape), dtype, device)
        rows = checkpoint.shapes[rule.ours][0]
        rule.read(checkpoint.sources(rule), value[:rows])
        value[rows:] = value[:rows].mean(0)  # an image's token, where the embedding has no row for it
        set_parameter(model, name, value)
    if config.tie_word_embeddings:
        model.decoder.tie_lm_head()


def _moved(name: str, config: TextConfig) -> str:
    """A parameter's name in the stack with gated blocks in it."""
    _, layers, rest = name.partition("decoder.layers.")
    if not layers:
        return name
    number, _, rest = rest.partition(".")
    return f"{layers}{config.self_attention_layers[int(number)]}.{rest}"


# --- the other parts -------------------------------------------------------------------------------------------------


def _vision(
    vision: Any, dtype: torch.dtype, device: torch.device, layer: int | None, class_token: bool
) -> tuple[nn.Module | Any, Preprocess | None]:
    """An encoder that was read, or the configuration of a new one; and how its pictures are prepared."""
    if isinstance(vision, str) and vision in VISION:
        vision = VISION[vision]()
    if isinstance(vision, str | Path):
        folder = locate(vision)
        encoder = load_encoder(
            folder, dtype, device, layer=layer,
            with_class_token=class_token, with_registers=class_token, pooling_head=False,
        )  # fmt: skip
        return encoder, load_preprocess(folder)
    if type(vision) not in VISION.values():
        raise ConfigError(f"vision must be a folder, a hub id or an encoder's configuration, not {vision!r}")
    if isinstance(vision, SiglipConfig):
        vision = replace(vision, pooling_head=False, layer=layer)
    elif isinstance(vision, ClipVisionConfig | Dinov2Config):
        vision = replace(vision, with_class_token=class_token, layer=layer)
    elif layer is not None:
        raise ConfigError(f"vision_layer is for SigLIP, CLIP and DINOv2, not for {type(vision).__name__}")
    if isinstance(vision, Dinov2Config):
        vision = replace(vision, with_registers=class_token)
    return vision, None


def _projector(projector: str | ProjectorConfig) -> Any:
    if not isinstance(projector, str):
        if type(projector) not in PROJECTORS.values():
            raise ConfigError(f"projector must be a name or a projector's configuration, not {projector!r}")
        return projector
    if projector not in PROJECTORS:
        hint = nearest(projector, PROJECTORS)
        raise ConfigError(f'there is no projector "{projector}"; known: {", ".join(PROJECTORS)}{hint}')
    return PROJECTORS[projector]()
