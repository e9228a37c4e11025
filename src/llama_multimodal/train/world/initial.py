"""Fresh weights from which a small encoder learns quickly.

A vision transformer has to find out which patches lie side by side before it can see a shape, and from nothing that
takes it most of a short training. Here some heads of every local block start out as a convolution's taps: with
positions written as sines and cosines, a shift by one patch is a rotation, so a query that is the rotated position
finds the neighbour's key. And it has to find edges, which are faint beside the mean colour of a patch: the patch
embedding starts as a whitening of the patches (as for CIFAR in Jordan 2024), in which a patch's 128 strongest
patterns weigh about the same. Training may change all of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...models import VisionLanguageModel
from ...models.mllama_vision import TiledVisionEncoder, VisionAttention, VisionBlock

_OPEN_GATE = 1.0  # tanh(1) = 0.76: a fresh model reads its pictures from the first step
_POSITION_GATE = 1.5  # most of a patch's position is that on the canvas, little that in its tile
_WAVELENGTHS = (3.0, 32.0)  # patches, of the fastest and the slowest sine
_FAINTEST = 0.1  # variance of a pattern that is whitened to half: fainter ones are mostly noise
_SHARPNESS = 0.9  # scale of the shifting heads' queries and keys
# (rows, columns) that the first heads of a block look away; blocks take the sets in turn.
_SHIFTS = (((0, 1), (0, -1), (1, 0), (-1, 0)), ((1, 1), (1, -1), (-1, 1), (-1, -1)))


def initialise(model: VisionLanguageModel, tiles: Tensor) -> None:
    """Small normal matrices, residual branches scaled by depth, open gates; the encoder's patches, places and shifts.

    tiles: [tiles, 3, S, S], what the encoder will see, a few hundred of them.
    """
    depth = model.config.text.num_hidden_layers
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            nn.init.constant_(parameter, _OPEN_GATE)
        elif parameter.ndim == 2 and "embedding" not in name:
            std = parameter.shape[1] ** -0.5
            residual = name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight"))
            nn.init.normal_(parameter, std=std / (2 * depth) ** 0.5 if residual else std)
    nn.init.normal_(model.decoder.embedding.weight, std=0.5)
    with torch.no_grad():
        vision = model.vision
        assert isinstance(vision, TiledVisionEncoder)
        space = _place(vision)
        vision.patch_embedding.weight.copy_(_whitening(vision, tiles, space))


def _whitening(vision: TiledVisionEncoder, tiles: Tensor, space: Tensor) -> Tensor:
    """A patch embedding [E, 3·patch²] that shows the patches' strongest patterns, each about as strongly.

    They go to directions outside `space` [E, D], as many as there are.
    """
    patches = vision.patches(tiles).flatten(0, -2).double()
    strengths, patterns = torch.linalg.eigh(patches.T @ patches / len(patches))  # ascending
    size, taken = space.shape
    count = min(size - taken, patches.shape[1])
    free = torch.linalg.qr(torch.cat((space, torch.randn(size, count)), dim=1)).Q[:, taken:]  # [E, count]
    gains = (strengths[-count:] + _FAINTEST).rsqrt()
    return free @ (gains[:, None] * patterns[:, -count:].T).to(free.dtype)


def _place(vision: TiledVisionEncoder) -> Tensor:
    """Write each patch's place on the canvas in a subspace of its own, and let heads look one patch away.

    Returns an orthonormal basis of that subspace, [E, D].
    """
    config = vision.config
    head = config.hidden_size // config.num_attention_heads
    waves = head // 4
    space = torch.linalg.qr(torch.randn(config.hidden_size, 4 * waves)).Q  # [E, D]
    fastest, slowest = _WAVELENGTHS
    rates = 2 * math.pi / torch.logspace(math.log10(fastest), math.log10(slowest), waves)
    side = config.image_size // config.patch_size
    nn.init.normal_(vision.position_embedding, std=0.02)
    nn.init.constant_(vision.position_gate, _POSITION_GATE)
    row, column = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    # About the size of what the patch shows.
    scale = 0.7 * math.sqrt(config.hidden_size / (2 * waves)) / math.tanh(_POSITION_GATE)
    for ratio_id, (rows, columns) in enumerate(config.aspect_ratios, start=1):
        for tile in range(rows * columns):
            y, x = row + tile // columns * side, column + tile % columns * side
            angles = torch.cat((y[:, None] * rates, x[:, None] * rates), dim=1)  # [P², D / 2]
            waved = torch.cat((angles.cos(), angles.sin()), dim=1) @ space.T
            vision.tile_position_embedding[ratio_id, tile, 1:] = scale * waved
    for number, block in enumerate(vision.layers):
        assert isinstance(block, VisionBlock)
        for index, (down, right) in enumerate(_SHIFTS[number % len(_SHIFTS)][: config.num_attention_heads]):
            of_head = slice(index * head, index * head + 4 * waves)
            _look_away(block.attention, of_head, torch.cat((down * rates, right * rates)), space)
    # What blocks compute stays out of the places' subspace.
    written: list[Tensor] = [vision.class_embedding]
    for block in (*vision.layers, *vision.global_layers):
        assert isinstance(block, VisionBlock)
        written.extend((block.attention.o_proj.weight, block.mlp.fc2.weight))
    for weight in written:
        weight.sub_(space @ (space.T @ weight))
    return space


def _look_away(attention: VisionAttention, rows: slice, angles: Tensor, space: Tensor) -> None:
    """Make a head's query the position turned by `angles` [D / 2], its key the position; a little noise for both."""
    cos, sin = angles.cos().diag(), angles.sin().diag()
    turn = torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))  # [cos, sin](p) → [cos, sin](p + shift)
    for linear, placed in ((attention.q_proj, turn @ space.T), (attention.k_proj, space.T)):
        linear.weight[rows] = 0.05 * linear.weight[rows] + _SHARPNESS * placed
