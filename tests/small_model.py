"""A small random model for the tests: every gate open, every norm, bias and embedding random."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llama_multimodal.config import ModelConfig, RopeScaling, TextConfig, TiledVisionConfig
from llama_multimodal.inputs import ImageLayout, ModelInputs, TextDecoder, batch_inputs
from llama_multimodal.models import VisionLanguageModel

IMAGE = 64  # the first embedding row past the LM head

CONFIG = ModelConfig(
    vision=TiledVisionConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_global_layers=2,
        num_attention_heads=2,
        image_size=28,  # 4 patches and the class token: 5 tokens a tile, which Meta pads to 8
        intermediate_layers_indices=(0, 2),
    ),
    text=TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=(1, 3),
        max_position_embeddings=64,
        rope_theta=10000.0,
        rope_scaling=RopeScaling(original_max_position_embeddings=16),
        num_extra_embeddings=8,
        bos_token_id=60,
        eos_token_ids=(61, 62),
        pad_token_id=63,
    ),
    image_token_id=IMAGE,
)


def unused_rows(table: Tensor, config: TiledVisionConfig) -> list[Tensor]:
    """Views of a tile table [ratios + 1, tiles, …] that no image of any layout reads as a real tile."""
    ratios = enumerate(config.aspect_ratios, start=1)
    return [table[0], *(table[i, rows * columns :] for i, (rows, columns) in ratios)]


def tile_tables(model: VisionLanguageModel) -> tuple[Tensor, Tensor, Tensor]:
    vision = model.vision
    return vision.tile_position_embedding, vision.pre_tile_embedding, vision.post_tile_embedding


@torch.no_grad()
def random_model(
    seed: int = 0, dtype: torch.dtype = torch.float32, config: ModelConfig = CONFIG
) -> VisionLanguageModel:
    """Weights of the size of a trained model's, so that every term shows in the logits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)

    model = VisionLanguageModel(config).to(torch.float64)
    for name, value in model.named_parameters():
        if name.endswith("_gate"):
            value.copy_(0.5 + 0.5 * torch.rand(1, generator=generator, dtype=torch.float64))
        elif "norm" in name and name.endswith("weight"):
            value.copy_(1 + 0.2 * normal(value.shape))
        elif value.ndim == 2 and "embedding" not in name:
            value.copy_(normal(value.shape) * value.shape[1] ** -0.5)
        else:
            value.copy_(0.3 * normal(value.shape))
    model.vision.patch_embedding.weight.mul_(4)  # pictures differ by more than the embeddings that they share
    model.decoder.embedding.weight.copy_(3 * normal(model.decoder.embedding.weight.shape))
    model.decoder.lm_head.weight.mul_(2)
    for table in tile_tables(model):
        for view in unused_rows(table, config.vision):
            view.zero_()
    return model.to(dtype).eval()


def make_inputs(
    rows: Sequence[Sequence[int]],
    grids: Sequence[Sequence[tuple[int, int]]] | None = None,
    *,
    seed: int = 0,
    config: ModelConfig = CONFIG,
    decoder: Callable[[], TextDecoder] | None = None,
) -> ModelInputs:
    """Rows of ids, and for each row the (rows, columns) of its images; a picture depends on its place in the list
    of its own row only, so that a row alone sees the pictures it saw in a batch."""
    grids = grids or [[] for _ in rows]
    side = config.vision.image_size
    layouts, tiles = [], [torch.zeros(0, 3, side, side, dtype=torch.float64)]
    for b, row in enumerate(grids):
        for i, (height, width) in enumerate(row):
            layouts.append(ImageLayout(height, width, row=b))
            generator = torch.Generator().manual_seed(1000 * seed + 100 * i + 10 * height + width)
            tiles.append(torch.randn(height * width, 3, side, side, generator=generator, dtype=torch.float64))
    return batch_inputs(
        rows,
        torch.cat(tiles),
        layouts,
        image_token_id=config.image_token_id,
        pad_token_id=config.text.pad_token_id,
        decoder=decoder,
    )


def one_row(inputs: ModelInputs, row: int) -> ModelInputs:
    """A row of a batch as a batch of its own."""
    length = inputs.lengths[row]
    ends = list(itertools.accumulate(image.num_tiles for image in inputs.images))
    keep = [
        (image, inputs.tiles[end - image.num_tiles : end])
        for image, end in zip(inputs.images, ends, strict=True)
        if image.row == row
    ]
    return ModelInputs(
        inputs.tokens[row : row + 1, :length],
        inputs.positions[row : row + 1, :length],
        (length,),
        torch.cat([inputs.tiles[:0], *(tiles for _, tiles in keep)]),
        tuple(replace(image, row=0) for image, _ in keep),
        inputs.visible[row : row + 1, :length],
        inputs.decoder,
    )


class Letters:
    """A text decoder that spells token t as `table[t]`, and has no characters of several tokens."""

    def __init__(self, table: Sequence[str]) -> None:
        self.table = table

    def push(self, token: int) -> str:
        return self.table[token]

    def flush(self) -> str:
        return ""
