"""The tiled vision encoder of Llama 3.2 Vision, computed over fewer tokens than Meta computes it, with the same result.

Meta pads every image to `max_num_tiles` tiles and every tile to a multiple of eight tokens, and its mask blocks
padding from padding only: real tokens attend to the padding. Three facts make an exact shorter computation
(docs/exactness.md):

* Padding tokens of equal content evolve equally, so one stands for all n of them, with log n added to its logit.
* Padding reads the real tokens only, so it needs no mask: one attention call for real queries over all keys, one for
  padding queries over the real keys.
* Nothing after the encoder reads padding.

Shapes: N images of one tile count · M real tiles an image · P tokens a tile (patches + 1) · U distinct padding tokens
E hidden size · H heads · D head dim · S side of a tile in pixels
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..config import TiledVisionConfig
from ..inputs import ImageLayout
from .layers import Linear, merge_heads, split_heads

_TOKEN_MULTIPLE = 8  # Meta pads the tokens of a tile to a multiple of this
_MLP_TOKENS = 2048  # of an image that go through the MLP at a time: its hidden values are a block's largest tensor


class VisionAttention(nn.Module):
    """Attention in which real tokens read everything and padding reads the real tokens."""

    def __init__(self, config: TiledVisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        size = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(size, size, bias=False) for _ in range(4))

    def forward(self, x: Tensor, num_real: int, key_bias: Tensor | None) -> Tensor:
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out = merge_heads(ops.attention(q[:, :, :num_real], k, v, key_bias=key_bias))
        if num_real < x.shape[1]:
            padding = ops.attention(q[:, :, num_real:], k[:, :, :num_real], v[:, :, :num_real])
            out = torch.cat((out, merge_heads(padding)), dim=1)
        return self.o_proj(out)


class VisionMLP(nn.Module):
    """Two linear maps with the exact GELU between."""

    def __init__(self, config: TiledVisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        pieces = math.ceil(x.shape[1] / _MLP_TOKENS)
        if pieces == 1 or torch.is_grad_enabled():  # autograd keeps every hidden value anyway
            return self._feed(x)
        out = torch.empty_like(x)
        for some, place in zip(x.chunk(pieces, dim=1), out.chunk(pieces, dim=1), strict=True):
            place.copy_(self._feed(some))
        return out

    def _feed(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1.gelu(x))


class VisionBlock(nn.Module):
    """Pre-norm block; the global blocks also scale each branch by a tanh gate."""

    def __init__(self, config: TiledVisionConfig, gated: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = VisionAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = VisionMLP(config)
        self.attention_gate = nn.Parameter(torch.zeros(1)) if gated else None
        self.mlp_gate = nn.Parameter(torch.zeros(1)) if gated else None

    def forward(self, x: Tensor, num_real: int, key_bias: Tensor | None) -> Tensor:
        attended = self.attention(self.attention_norm(x), num_real, key_bias)
        x = x + (attended if self.attention_gate is None else self.attention_gate.tanh() * attended)
        fed = self.mlp(self.mlp_norm(x))
        return x + (fed if self.mlp_gate is None else self.mlp_gate.tanh() * fed)


class TiledVisionEncoder(nn.Module):
    """Packed tiles → features of their tokens: the final state and the states *entering* the tapped blocks.

    The embeddings that depend on a tile's place are tables by aspect-ratio id (row 0: no image) and tile.
    """

    def __init__(self, config: TiledVisionConfig) -> None:
        super().__init__()
        self.config = config
        size, tokens = config.hidden_size, config.num_patches
        ratios, tiles = len(config.aspect_ratios) + 1, config.max_num_tiles
        scale = size**-0.5
        self.patch_embedding = Linear(config.num_channels * config.patch_size**2, size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(size))
        self.position_embedding = nn.Parameter(scale * torch.randn(tokens, size))
        self.position_gate = nn.Parameter(torch.zeros(1))
        self.tile_position_embedding = nn.Parameter(torch.zeros(ratios, tiles, tokens, size))
        self.pre_tile_embedding = nn.Parameter(torch.zeros(ratios, tiles, size))
        self.pre_tile_gate = nn.Parameter(torch.zeros(1))
        self.post_tile_embedding = nn.Parameter(torch.zeros(ratios, tiles, size))
        self.post_tile_gate = nn.Parameter(torch.zeros(1))
        self.pre_norm = nn.LayerNorm(size, eps=config.norm_eps)
        self.layers = nn.ModuleList(VisionBlock(config, gated=False) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(size, eps=config.norm_eps)
        self.global_layers = nn.ModuleList(VisionBlock(config, gated=True) for _ in range(config.num_global_layers))
        # State of the tile tables when their unused rows were last looked at, and what was found.
        self._tables_seen: tuple[tuple[tuple[int, int], ...], bool] | None = None

    def forward(self, tiles: Tensor, images: Sequence[ImageLayout], *, deduplicate: bool | None = None) -> Tensor:
        """Features of every real tile's tokens, in the order of the tiles.

        tiles: [tiles, 3, S, S]; images: their layouts → [tiles, P, output_size]

        deduplicate: share equal padding tiles. None decides by the weights: a checkpoint whose unused tiles carry
            embeddings of their own gets the plain path.
        """
        if deduplicate is None:
            deduplicate = self.padding_tiles_are_equal()
        counts = sorted({image.num_tiles for image in images})
        if len(counts) == 1:  # nothing to sort, and no second copy of the features
            return self._encode(tiles.unflatten(0, (-1, counts[0])), images, deduplicate).flatten(0, 1)
        starts, total = [], 0
        for image in images:
            starts.append(total)
            total += image.num_tiles
        features = tiles.new_empty(total, self.config.num_patches, self.config.output_size)
        for count in counts:
            group = [i for i, image in enumerate(images) if image.num_tiles == count]
            index = torch.tensor([starts[i] + t for i in group for t in range(count)], device=tiles.device)
            encoded = self._encode(tiles[index].unflatten(0, (-1, count)), [images[i] for i in group], deduplicate)
            features.index_copy_(0, index, encoded.flatten(0, 1))
        return features

    def padding_tiles_are_equal(self) -> bool:
        """Whether no unused tile carries an embedding, as in every checkpoint in Meta's layout.

        The tables are large: they are looked at again only once one was replaced or written to.
        """
        if self.pre_tile_embedding.device.type == "meta":
            return True
        tables = (self.tile_position_embedding, self.pre_tile_embedding, self.post_tile_embedding)
        if torch.is_grad_enabled() or any(table.is_inference() for table in tables):
            # Inference tensors do not count their changes, and not every optimizer's step is counted.
            self._tables_seen = None
            return self._unused_rows_are_zero(tables)
        state = tuple((table.data_ptr(), table._version) for table in tables)
        if self._tables_seen is None or self._tables_seen[0] != state:
            self._tables_seen = (state, self._unused_rows_are_zero(tables))
        return self._tables_seen[1]

    def _unused_rows_are_zero(self, tables: Sequence[Tensor]) -> bool:
        return not any(
            bool(table[ratio_id, rows * columns :].any())
            for ratio_id, (rows, columns) in enumerate(self.config.aspect_ratios, start=1)
            for table in tables
        )

    def _encode(self, tiles: Tensor, images: Sequence[ImageLayout], deduplicate: bool) -> Tensor:
        """tiles: [N, M, 3, S, S] of images that all have M tiles → [N, M, P, output_size]"""
        config = self.config
        num_images, num_tiles = tiles.shape[:2]
        ids = torch.tensor([1 + config.aspect_ratios.index((i.rows, i.columns)) for i in images], device=tiles.device)
        spare = config.max_num_tiles - num_tiles
        distinct = min(spare, 1) if deduplicate else spare  # padding tiles that are computed
        x = self._embed(tiles, ids, distinct)  # [N, M + distinct, P, E]
        num_real = num_tiles * config.num_patches
        x = self.pre_norm(x).flatten(1, 2)
        # Meta appends zero tokens to every tile *after* this norm; they are equal everywhere, so one stands for all.
        zeros = -config.num_patches % _TOKEN_MULTIPLE  # of each tile
        if zeros:
            x = torch.cat((x, x.new_zeros(num_images, 1, config.hidden_size)), dim=1)
        key_bias = self._key_bias(num_real, distinct, spare, [zeros * config.max_num_tiles], x)

        taps = []
        for i, block in enumerate(self.layers):
            if i in config.intermediate_layers_indices:
                taps.append(x[:, :num_real])
            x = block(x, num_real, key_bias)
        x = self.post_norm(x)
        grid = self.post_tile_gate.tanh() * self.post_tile_embedding[ids, : num_tiles + distinct]  # [N, tiles, E]
        # Every token of a tile gets its embedding, the zero tokens too: from here on they differ from tile to tile.
        x = self._add_to_tiles(x, grid, bool(zeros))
        copies = [zeros] * num_tiles + [zeros * spare // max(distinct, 1)] * distinct
        key_bias = self._key_bias(num_real, distinct, spare, copies, x)
        for block in self.global_layers:
            x = block(x, num_real, key_bias)
        features = x.new_empty(num_images, num_real, config.output_size)
        features[..., : config.hidden_size] = x[:, :num_real]
        for i, tap in enumerate(taps):  # Meta stacks them on a new last axis and flattens it: feature-major, tap-minor
            features[..., config.hidden_size + i :: len(taps)] = tap
        return features.unflatten(1, (num_tiles, config.num_patches))

    def _embed(self, tiles: Tensor, ids: Tensor, distinct: int) -> Tensor:
        """Patch, tile and position embeddings of real tiles and `distinct` black padding tiles: [N, tiles, P, E]."""
        num_tiles = tiles.shape[1]
        x = self.patch_embedding(self.patches(tiles.flatten(0, 1))).unflatten(0, tiles.shape[:2])
        if distinct:
            x = torch.cat((x, x.new_zeros(x.shape[0], distinct, *x.shape[2:])), dim=1)
        used = num_tiles + distinct
        x = x + (self.pre_tile_gate.tanh() * self.pre_tile_embedding[ids, :used])[:, :, None]
        cls = self.class_embedding.expand(*x.shape[:2], 1, -1)
        x = torch.cat((cls, x), dim=2)
        gate = self.position_gate.tanh()
        x = x + (1 - gate) * self.position_embedding
        return x + gate * self.tile_position_embedding[ids, :used]

    def _add_to_tiles(self, x: Tensor, grid: Tensor, zeros: bool) -> Tensor:
        """Each tile's row of grid [N, tiles, E] added to its tokens, and to its zero token where there are any."""
        used = grid.shape[1] * self.config.num_patches
        added = (x[:, :used].unflatten(1, (-1, self.config.num_patches)) + grid[:, :, None]).flatten(1, 2)
        return torch.cat((added, x[:, used:] + grid), dim=1) if zeros else added

    def patches(self, tiles: Tensor) -> Tensor:
        """Tiles cut into patches, row by row, each channel by channel: [tiles, 3, S, S] → [tiles, side², 3·patch²]"""
        patch = self.config.patch_size
        side = self.config.image_size // patch
        cut = tiles.reshape(-1, self.config.num_channels, side, patch, side, patch)
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _key_bias(self, num_real: int, distinct: int, spare: int, zeros: Sequence[int], x: Tensor) -> Tensor | None:
        """log of how many tokens each key stands for, [tokens], at least fp32; None where every key stands for itself.

        zeros: how many zero tokens each of the last keys stands for. x: whose device and dtype to go by.
        """
        per_tile = math.log(spare / distinct) if distinct else 0.0
        bias = [0.0] * num_real + [per_tile] * (distinct * self.config.num_patches)
        bias += [math.log(count) for count in zeros if count]
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.tensor(bias, dtype=dtype, device=x.device) if any(bias) else None
