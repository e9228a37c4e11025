"""Weights, gradients and optimizer state shared out among processes: FSDP2 (Zhao et al. 2023; ZeRO, Rajbhandari et al.
2020), and what a training step needs besides.

Every process gathers a block's weights just before it computes with them and lets them go again. So all must call the
same blocks in the same order: `match_images` sees to it that all have pictures where one has.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor, Replicate

from ..config import AnyModelConfig, ModelConfig, TiledVisionConfig
from ..errors import ConfigError
from ..inputs import ImageLayout, ModelInputs
from ..models import LanguageModel, VisionLanguageModel
from ..models.llama import CrossAttention
from .mesh import DATA, SHARD, TENSOR, broadcast_parameters, local_part, max_over_readers, sum_over_pieces

IGNORED = -100
"""Label of a token that nothing is learnt from."""


def shard_model(
    model: LanguageModel,
    mesh: DeviceMesh,
    *,
    precision: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> LanguageModel:
    """Share out a model's parameters in place, over the mesh's `shard` axis, with copies along `data`; returns it.

    Every block of the encoder and the decoder is a unit of its own. Parameters may be frozen, within a unit too, and a
    model that `parallelize` changed may be given. All processes start from the first one's weights. Gradients are
    *sums* over the readers: divide the loss by what it is a mean over everywhere (`sum_over_readers`).

    A model on the meta device may be given, and filled afterwards (`fill_parameter`).

    precision: dtype of the products, with gradients summed in fp32; None computes in the weights' own
    reshard_after_forward: let a block's weights go after its forward pass; else they stay until its backward pass

    Raises:
        ConfigError: the model is sharded already.
    """
    if isinstance(model, FSDPModule):
        raise ConfigError("the model is sharded already; shard it once, after parallelize and after adapters")
    broadcast_parameters(list(model.parameters()), mesh, (DATA, SHARD))
    # Sums of half-precision gradients lose their small terms. The units cast nothing that they are given: angles and
    # biases of attention stay in fp32, as everywhere; pixels are cast where they enter.
    summed = None if precision is None else torch.float32
    policy = MixedPrecisionPolicy(precision, summed, cast_forward_inputs=False)
    over = mesh[SHARD] if mesh[DATA].size() == 1 else mesh[DATA, SHARD]
    for unit in _blocks(model):
        fully_shard(unit, mesh=over, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        if isinstance(unit, CrossAttention):
            gather_for(unit, "project")
    if isinstance(model, VisionLanguageModel):
        fully_shard(model.vision, mesh=over, mp_policy=replace(policy, cast_forward_inputs=True))
    fully_shard(model, mesh=over, mp_policy=policy)
    for method in ("read_images", "hidden"):
        gather_for(model, method)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    return model


def gather_once(model: nn.Module) -> None:
    """Gather the weights of every unit and let them go, before the first step, of a model that accumulates gradients or
    generates. All call this together.

    With `precision`, torch 2.13 ends a backward pass that exchanges nothing in an AttributeError if a unit was never
    gathered, as the encoder's are not before the first picture. And buffers that are first made under `inference_mode`
    cannot take part in training.
    """
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.unshard()
            unit.reshard()


def gather_for(module: nn.Module, name: str) -> None:
    """Have a method of a sharded module gather its weights, as its `forward` does; of any other it stays as it is.

    Within another such method the weights are there: FSDP would take the end of the inner one for that of the outer.
    """
    if not isinstance(module, FSDPModule):
        return
    plain = getattr(module, name)
    register_fsdp_forward_method(module, name)
    gathering, state = getattr(module, name), module._get_fsdp_state()

    def method(*args: Any, **kwargs: Any) -> Any:
        inside = state._training_state == TrainingState.FORWARD
        return (plain if inside else gathering)(*args, **kwargs)

    setattr(module, name, method)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The units within the model, the inner ones first: blocks, and what of a block is also called without it."""
    for module in reversed(list(model.modules())):
        for block in module if isinstance(module, nn.ModuleList) else ():
            # It projects images into keys and values before the block runs.
            yield from (inner for inner in block.modules() if isinstance(inner, CrossAttention))
            yield block


# --- a training step --------------------------------------------------------------------------------------------------


def sync_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward passes exchange gradients: False for all but a step's last, which then needs one
    exchange for all of them. Until then every process keeps whole gradients."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> Tensor:
    """The norm of the gradients of all parameters on all processes, in fp64; all call this together."""
    by_copies: defaultdict[int, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_copies[_copies(parameter.grad, mesh)].append(local_part(parameter.grad))
    total = torch.zeros((), dtype=torch.float64, device=mesh.device_type)
    for copies, gradients in by_copies.items():
        total += nn.utils.get_total_norm(gradients).double() ** 2 / copies
    return sum_over_pieces(total, mesh).sqrt()


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Bring gradients whose `gradient_norm` is `norm` down to a norm of `max_norm`, where it is larger."""
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            local_part(parameter.grad).mul_(scale.to(parameter.grad.dtype))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, mesh: DeviceMesh) -> Tensor:
    """Scale gradients down to a norm of `max_norm` over all parameters on all processes; returns the norm before."""
    parameters = list(parameters)
    norm = gradient_norm(parameters, mesh)
    scale_gradients(parameters, max_norm, norm)
    return norm


def _copies(value: Tensor, mesh: DeviceMesh) -> int:
    """How many processes of one copy of the model hold the same piece of a tensor."""
    cut: set[str] = set()
    if isinstance(value, DTensor):
        names = value.device_mesh.mesh_dim_names or ()
        cut = {name for name, place in zip(names, value.placements) if not isinstance(place, Replicate)}
    return math.prod(mesh[axis].size() for axis in (SHARD, TENSOR) if axis not in cut)


def alike(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in groups that are cut along the same axes. An optimizer that works on many tensors at once
    (`foreach`, `fused`) takes each as a group of its own, since torch does not mix them."""
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(mesh, []).append(parameter)
    return list(groups.values())


# --- batches with pictures and batches without ------------------------------------------------------------------------


def match_images(
    inputs: ModelInputs, labels: Tensor, config: AnyModelConfig, mesh: DeviceMesh
) -> tuple[ModelInputs, Tensor]:
    """A batch for a sharded model, in which every reader calls the same blocks: where another reader's batch has
    pictures and this one's has none, it gets a row with a blank one, from which nothing is learnt.

    The tiled encoder runs once for every number of tiles, so there a blank picture stands for each number that is
    missing. All readers must call this together.

    labels: [B, T], of a row's tokens → with the new rows ignored
    """
    if not isinstance(config, ModelConfig):  # it reads text alone
        return inputs, labels
    tiled = config.vision if isinstance(config.vision, TiledVisionConfig) else None
    mine = torch.zeros(tiled.max_num_tiles if tiled else 1, dtype=torch.int64)
    for image in inputs.images:
        mine[image.num_tiles - 1 if tiled else 0] = 1
    anywhere = max_over_readers(mine.clone(), mesh)
    blank = [_blank(config, count) for count in range(1, len(mine) + 1) if anywhere[count - 1] > mine[count - 1]]
    return _with_rows(inputs, labels, config, blank) if blank else (inputs, labels)


def _blank(config: ModelConfig, tiles: int) -> ImageLayout:
    """A picture of so many tiles, as the model's preprocessing would cut one."""
    side = config.vision.image_size
    if config.fusion == "cross_attention":
        return ImageLayout(1, tiles)
    tokens = config.num_tokens(side, side)
    if config.grid_pinpoints:
        crop = ImageLayout(1, 1, whole=True, size=(side, side))
        return replace(crop, num_tokens=crop.anyres_tokens(math.isqrt(tokens)))
    return ImageLayout(1, tiles, num_tokens=tiles * tokens)


def _with_rows(
    inputs: ModelInputs, labels: Tensor, config: ModelConfig, blank: Sequence[ImageLayout]
) -> tuple[ModelInputs, Tensor]:
    """A row for each picture, with its placeholders alone."""
    rows, width = inputs.tokens.shape
    wider = max(width, *(image.num_tokens for image in blank))
    tokens = F.pad(inputs.tokens, (0, wider - width, 0, len(blank)), value=config.text.pad_token_id)
    positions = F.pad(inputs.positions, (0, wider - width, 0, len(blank)))  # packed rows count from 0 again and again
    positions[rows:] = torch.arange(wider, device=positions.device)
    visible = F.pad(inputs.visible, (0, 0, 0, wider - width, 0, len(blank)))
    for row, image in enumerate(blank, start=rows):
        tokens[row, : image.num_tokens] = config.image_token_id
        if config.fusion == "cross_attention":
            visible[row, 0] = torch.tensor((0, 1))
    side, channels = config.vision.image_size, inputs.tiles.shape[1]
    pixels = inputs.tiles.new_zeros(sum(image.num_tiles for image in blank), channels, side, side)
    more = replace(
        inputs,
        tokens=tokens,
        positions=positions,
        lengths=(*inputs.lengths, *(image.num_tokens for image in blank)),
        tiles=torch.cat((inputs.tiles, pixels)) if len(inputs.tiles) else pixels,
        images=(*inputs.images, *(replace(image, row=row) for row, image in enumerate(blank, start=rows))),
        visible=visible,
        segments=_more_segments(inputs.segments, wider - width, len(blank)),
    )
    return more, F.pad(labels, (0, wider - width, 0, len(blank)), value=IGNORED)


def _more_segments(segments: Tensor | None, columns: int, rows: int) -> Tensor | None:
    """[B, T], with padding that is a segment of its own."""
    return None if segments is None else F.pad(segments, (0, columns, 0, rows), value=-1)
