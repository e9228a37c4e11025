"""How many parameters a model has, by part, from its configuration alone.

Letters: E hidden size · F width of the feed-forward block · K width of keys, key heads · head dim · V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config import (
    AnyModelConfig,
    ClipVisionConfig,
    Dinov2Config,
    IdentityProjector,
    LanguageModelConfig,
    LinearProjector,
    MLPProjector,
    PixelShuffleProjector,
    SiglipConfig,
    TextConfig,
    TiledVisionConfig,
    VitConfig,
)
from ..errors import ConfigError


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters. Packing rounds `matrices` and `lm_head`; tensor parallelism divides `matrices`,
    `vision_matrices` and nearly all of the projector."""

    matrices: int  # of the decoder's blocks
    lm_head: int  # 0 where it is the embedding's table
    embedding: int
    vectors: int  # norms and gates of the decoder
    vision: int
    vision_matrices: int  # of them those of its blocks
    projector: int  # LLaVA-NeXT's newline too

    @property
    def decoder(self) -> int:
        return self.matrices + self.lm_head + self.embedding + self.vectors

    @property
    def total(self) -> int:
        return self.decoder + self.vision + self.projector


def count_parameters(config: AnyModelConfig) -> Parameters:
    """The parameters of a model, as it is built here.

    Raises:
        ConfigError: an encoder or a projector that was registered from outside, whose size is not known here.
    """
    text = config.text
    cross = len(text.cross_attention_layers)
    vectors = 2 * text.hidden_size * text.num_hidden_layers + text.hidden_size  # two norms a block, and the last one
    vectors += cross * (2 * text.head_dim + 2)  # norms of queries and keys, gates
    vision = matrices = projector = 0
    if not isinstance(config, LanguageModelConfig):
        vision = _of(_VISION, config.vision)(config.vision)
        matrices = _vision_matrices(config.vision)
        count = _of(_PROJECTORS, config.projector)
        projector = count(config.projector, config.vision.output_size, text.hidden_size)
        projector += text.hidden_size * bool(config.grid_pinpoints)
    return Parameters(
        matrices=block_matrices(text) * text.num_hidden_layers,
        lm_head=0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size,
        embedding=(text.vocab_size + text.num_extra_embeddings) * text.hidden_size,
        vectors=vectors,
        vision=vision,
        vision_matrices=matrices,
        projector=projector,
    )


def block_matrices(text: TextConfig) -> int:
    """Of one block, with self-attention or with gated cross-attention: queries and output, keys and values, SwiGLU."""
    return sum(inputs * outputs for inputs, outputs in block_shapes(text))


def gated_projections(text: TextConfig) -> int:
    """Of one gated block's attention: queries and output, keys and values."""
    return sum(inputs * outputs for inputs, outputs in block_shapes(text)[:4])


def block_shapes(text: TextConfig) -> tuple[tuple[int, int], ...]:
    """(inputs, outputs) of a block's linear layers: q, k, v, o, gate, up, down."""
    size, inner, keys = text.hidden_size, text.intermediate_size, text.num_key_value_heads * text.head_dim
    return (size, size), (size, keys), (size, keys), (size, size), (size, inner), (size, inner), (inner, size)


def vision_shapes(config: AnyModelConfig) -> tuple[tuple[int, int], ...]:
    """(inputs, outputs) of the linear layers of all of the encoder's blocks that are read."""
    if isinstance(config, LanguageModelConfig):
        return ()
    vision: Any = config.vision
    size, inner = vision.hidden_size, vision.intermediate_size
    swiglu = getattr(vision, "swiglu", False)
    feed = ((size, 2 * inner if swiglu else inner), (inner, size))
    blocks = getattr(vision, "num_blocks", vision.num_hidden_layers) + getattr(vision, "num_global_layers", 0)
    return ((size, size), (size, size), (size, size), (size, size), *feed) * blocks


def projector_shapes(config: AnyModelConfig) -> tuple[tuple[int, int], ...]:
    """(inputs, outputs) of the projector's linear layers."""
    if isinstance(config, LanguageModelConfig):
        return ()
    vision, text = config.vision.output_size, config.text.hidden_size
    if isinstance(config.projector, LinearProjector):
        return ((vision, text),)
    if isinstance(config.projector, MLPProjector):
        return (vision, text), (text, text)
    if isinstance(config.projector, PixelShuffleProjector):
        return ((vision * config.projector.scale_factor**2, text),)
    return ()


def _of(counts: dict[type[Any], Callable[..., int]], part: Any) -> Callable[..., int]:
    if type(part) not in counts:
        known = ", ".join(kind.__name__ for kind in counts)
        raise ConfigError(f"there is no plan for a {type(part).__name__}; there are plans for {known}")
    return counts[type(part)]


# --- vision encoders -------------------------------------------------------------------------------------------------


def _tiled(vision: TiledVisionConfig) -> int:
    size, inner = vision.hidden_size, vision.intermediate_size
    tables = (len(vision.aspect_ratios) + 1) * vision.max_num_tiles  # an embedding for each tile of each grid
    embeddings = size * (vision.num_channels * vision.patch_size**2 + 1 + vision.num_patches)
    embeddings += tables * size * (vision.num_patches + 2) + 3  # at positions, before and behind the blocks; gates
    block = 4 * size + 4 * size**2 + 2 * size * inner + inner + size
    blocks = block * (vision.num_hidden_layers + vision.num_global_layers) + 2 * vision.num_global_layers
    return embeddings + 4 * size + blocks


def _vit(vision: VitConfig, block: int, extra: int) -> int:
    """block: of each, besides its attention; extra: outside blocks, besides the embeddings of patches and positions."""
    size = vision.hidden_size
    embeddings = size * (vision.num_channels * vision.patch_size**2 + vision.side**2)
    return embeddings + extra + vision.num_hidden_layers * (block + 4 * size**2 + size)


def _vision_matrices(vision: Any) -> int:
    blocks = vision.num_hidden_layers + getattr(vision, "num_global_layers", 0)
    products = 3 if getattr(vision, "swiglu", False) else 2
    return blocks * (4 * vision.hidden_size**2 + products * vision.hidden_size * vision.intermediate_size)


def _mlp(size: int, inner: int) -> int:
    return 2 * size * inner + inner + size


def _siglip(vision: SiglipConfig) -> int:
    size = vision.hidden_size
    mlp = _mlp(size, vision.intermediate_size)
    head = size + 4 * size**2 + 4 * size + 2 * size + mlp if vision.pooling_head else 0
    return _vit(vision, 4 * size + 3 * size + mlp, size + 2 * size + head)


def _clip(vision: ClipVisionConfig) -> int:
    size = vision.hidden_size
    # A class token and its position, and the norms before and behind the blocks.
    return _vit(vision, 4 * size + 3 * size + _mlp(size, vision.intermediate_size), 2 * size + 4 * size)


def _dinov2(vision: Dinov2Config) -> int:
    size, inner = vision.hidden_size, vision.intermediate_size
    mlp = 3 * size * inner + 2 * inner + size if vision.swiglu else _mlp(size, inner)
    block = 4 * size + 3 * size * vision.qkv_bias + mlp + 2 * size  # with a factor a channel for each branch
    return _vit(vision, block, size + 2 * size + vision.num_register_tokens * size + 2 * size)


_VISION: dict[type[Any], Callable[..., int]] = {
    TiledVisionConfig: _tiled,
    SiglipConfig: _siglip,
    ClipVisionConfig: _clip,
    Dinov2Config: _dinov2,
}

# --- projectors: of the encoder's width and the decoder's ------------------------------------------------------------


def _linear(projector: LinearProjector, vision: int, text: int) -> int:
    return vision * text + text * projector.bias


def _mlp_projector(projector: MLPProjector, vision: int, text: int) -> int:
    return vision * text + text**2 + 2 * text * projector.bias


def _pixel_shuffle(projector: PixelShuffleProjector, vision: int, text: int) -> int:
    return vision * projector.scale_factor**2 * text + text * projector.bias


_PROJECTORS: dict[type[Any], Callable[..., int]] = {
    LinearProjector: _linear,
    MLPProjector: _mlp_projector,
    PixelShuffleProjector: _pixel_shuffle,
    IdentityProjector: lambda *_: 0,
}
