"""Keeping the tile embeddings of Llama 3.2 Vision's encoder as Meta's layout has them, while they are trained."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.mllama_vision import TiledVisionEncoder


def share_between_ratios(vision: TiledVisionEncoder) -> None:
    """Hooks on the gradients of the tables by aspect ratio, which keep these as Meta's layout has them.

    There a tile's embedding depends on its row and column alone and unused tiles have none: entries of one place
    share their gradients, and entries that start equal stay equal.
    """
    most, device = vision.config.max_num_tiles, vision.pre_tile_embedding.device
    places = torch.full((len(vision.config.aspect_ratios) + 1, most), -1, device=device)
    for ratio_id, (rows, columns) in enumerate(vision.config.aspect_ratios, start=1):
        for tile in range(rows * columns):
            places[ratio_id, tile] = tile // columns * most + tile % columns
    used = places >= 0

    def share(gradient: Tensor) -> Tensor:
        summed = gradient.new_zeros(most * most, *gradient.shape[2:]).index_add(0, places[used], gradient[used])
        shared = torch.zeros_like(gradient)
        shared[used] = summed[places[used]]
        return shared

    for table in (vision.tile_position_embedding, vision.pre_tile_embedding, vision.post_tile_embedding):
        if table.requires_grad:
            table.register_hook(share)
