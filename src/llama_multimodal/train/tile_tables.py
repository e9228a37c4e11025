"""Keeping the tile embeddings of Llama 3.2 Vision's encoder as Meta's layout has them, while they are trained.

There a tile's embedding depends on its row and column alone and unused tiles have none: in the tables by aspect ratio
entries of one place share their gradients, and entries that start equal stay equal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config import TiledVisionConfig
from ..distributed import fill_parameter
from ..models.mllama_vision import TiledVisionEncoder


def share_between_ratios(vision: TiledVisionEncoder) -> None:
    """Hooks on the gradients of the tables that one process holds whole."""
    for table in _tables(vision):
        if table.requires_grad and not isinstance(table, DTensor):
            table.register_hook(lambda gradient: _shared(gradient, vision.config))


@torch.no_grad()
def share_gradients(vision: TiledVisionEncoder) -> None:
    """The same of tables that are cut, after their gradients were exchanged; all processes call this together."""
    for table in _tables(vision):
        if isinstance(table.grad, DTensor):
            fill_parameter(table.grad, _shared(table.grad.full_tensor(), vision.config))


def _tables(vision: TiledVisionEncoder) -> tuple[nn.Parameter, ...]:
    return vision.tile_position_embedding, vision.pre_tile_embedding, vision.post_tile_embedding


def _shared(gradient: Tensor, config: TiledVisionConfig) -> Tensor:
    most = config.max_num_tiles
    places = torch.full((len(config.aspect_ratios) + 1, most), -1, device=gradient.device)
    for ratio_id, (rows, columns) in enumerate(config.aspect_ratios, start=1):
        for tile in range(rows * columns):
            places[ratio_id, tile] = tile // columns * most + tile % columns
    used = places >= 0
    summed = gradient.new_zeros(most * most, *gradient.shape[2:]).index_add(0, places[used], gradient[used])
    shared = torch.zeros_like(gradient)
    shared[used] = summed[places[used]]
    return shared
