"""Tensor parallelism (Shoeybi et al. 2019): each process computes its heads and its share of the feed-forward width.

A plan is a table of module names and styles. A pair of products is cut as in the paper: the first by its outputs
("colwise"), the second by its inputs ("rowwise"), whose partial sums are added up; where the pair is entered, the
backward pass adds up the gradients ("enter"). Parameters become DTensors, so that optimizers, FSDP2 and distributed
checkpoints know what the whole is; the layers hand their *local* part to the ops, which know nothing of any of this.

Shapes: n processes of the tensor axis · N outputs · K inputs
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard, distribute_tensor

from .. import ops
from ..adapters.layers import LoraLinear, LowRank
from ..config import nearest
from ..errors import ConfigError
from ..models import ImageEncoder, LanguageModel, VisionLanguageModel
from ..models.layers import Linear, PackedLinear, RMSNorm
from ..models.mllama_vision import TiledVisionEncoder
from ..models.projectors import MLP, PixelShuffle
from .mesh import TENSOR, broadcast_parameters, local_part

Style = Literal["enter", "heads", "colwise", "rowwise", "gather", "slice", "head_norm"]
"""What a plan can ask of a module:

enter: what it is called with comes from all processes alike; its gradients are added up
heads: an attention, which counts its local heads from then on
colwise: a linear layer that computes N/n outputs
rowwise: a linear layer that is given K/n inputs, and adds up the outputs of all
gather: colwise, and the outputs of all side by side
slice: rowwise, given all K inputs, of which it takes its own
head_norm: a norm over each head's channels, whose weight all heads share
"""
Plan = tuple[tuple[str, Style], ...]
"""Globs of modules' names, and what becomes of them. A glob that matches nothing is left out."""

DECODER: Plan = (
    ("decoder.layers.*.attention", "heads"),
    ("decoder.layers.*.attention.qkv", "enter"),
    ("decoder.layers.*.attention.qkv.*_proj", "colwise"),
    ("decoder.layers.*.attention.q_proj", "enter"),
    ("decoder.layers.*.attention.q_proj", "colwise"),
    ("decoder.layers.*.attention.kv", "enter"),
    ("decoder.layers.*.attention.kv.*_proj", "colwise"),
    ("decoder.layers.*.attention.[qk]_norm", "head_norm"),
    ("decoder.layers.*.attention.o_proj", "rowwise"),
    ("decoder.layers.*.mlp.gate_up", "enter"),
    ("decoder.layers.*.mlp.gate_up.*_proj", "colwise"),
    ("decoder.layers.*.mlp.down_proj", "rowwise"),
)
"""Embedding, norms and LM head stay whole everywhere. `(("decoder.lm_head", "enter"), ("decoder.lm_head", "gather"))`
cuts the head by its vocabulary, for code that calls it and does not read its weight."""

VISION: Plan = (
    ("vision.*layers.*.attention", "heads"),
    ("vision.*layers.*.attention", "enter"),
    ("vision.*layers.*.attention.[qkv]_proj", "colwise"),
    ("vision.*layers.*.attention.o_proj", "rowwise"),
    ("vision.*layers.*.mlp", "enter"),
    ("vision.*layers.*.mlp.fc1", "colwise"),
    ("vision.*layers.*.mlp.fc2", "rowwise"),
    # DINOv2's gated block has gate and up in one weight, whose rows do not lie together in a process's share.
    ("vision.*layers.*.mlp.gate_up", "gather"),
    ("vision.*layers.*.mlp.down_proj", "slice"),
)
"""The blocks of the tiled encoder, SigLIP, CLIP and DINOv2."""

_KINDS_OF_HEADS = ("num_heads", "num_kv_heads")
_PROJECTORS: dict[type[nn.Module], Plan] = {
    Linear: (("projector", "enter"), ("projector", "gather")),
    MLP: (("projector", "enter"), ("projector.fc1", "colwise"), ("projector.fc2", "rowwise")),
    PixelShuffle: (("projector.proj", "enter"), ("projector.proj", "gather")),
}


def default_plan(model: LanguageModel) -> Plan:
    """The decoder, and the encoder and projector where they are this library's; what others registered stays whole."""
    plan = DECODER
    if isinstance(model, VisionLanguageModel):
        plan += VISION if isinstance(model.vision, TiledVisionEncoder | ImageEncoder) else ()
        plan += _PROJECTORS.get(type(_plain(model.projector)), ())
    return plan


def parallelize(model: LanguageModel, mesh: DeviceMesh, plan: Plan | None = None) -> LanguageModel:
    """Share a model's products among the mesh's `tensor` axis, in place; returns it.

    For inference and training, after adapters, which are cut as their layers are, and before `shard_model`. All
    processes start from the first one's weights, must be given the same inputs, and compute the same logits. A model on
    the meta device may be given, and filled afterwards (`checkpoint.load_full_state`, `mesh.fill_parameter`).

    plan: None takes `default_plan`

    Raises:
        ConfigError: heads or widths do not divide by the axis, a layer is packed or shared with another, or has an
            adapter that learns lengths of rows (DoRA).
    """
    if isinstance(model, FSDPModule):
        raise ConfigError("the model is sharded already; parallelize it first")
    parts = mesh[TENSOR]
    if parts.size() == 1:
        return model
    found = _found(model, default_plan(model) if plan is None else plan)
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, style in found:
        _check(name, model.get_submodule(name), style, parts.size(), owners)
    broadcast_parameters(list(model.parameters()), mesh, (TENSOR,))
    for name, style in found:
        module = model.get_submodule(name)
        if style == "heads":
            for kind in _KINDS_OF_HEADS:
                if hasattr(module, kind):
                    setattr(module, kind, getattr(module, kind) // parts.size())
        elif style != "enter":
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _swapped(module, style, parts))
    for name, style in found:  # on the modules that are there now
        if style == "enter":
            model.get_submodule(name).register_forward_pre_hook(_Entry(parts.get_group()))
    return model


def _found(model: nn.Module, plan: Plan) -> list[tuple[str, Style]]:
    for _, style in plan:
        if style not in get_args(Style):
            raise ConfigError(f'a plan\'s style "{style}" is not known{nearest(style, get_args(Style))}')
    names = [name for name, _ in model.named_modules()]
    return [(name, style) for glob, style in plan for name in names if fnmatchcase(name, glob)]


def _check(name: str, module: nn.Module, style: Style, parts: int, owners: dict[int, int]) -> None:
    """Raises:
    ConfigError: the module cannot be cut in so many parts.
    """
    if style == "enter":
        return
    if style == "heads":
        if not hasattr(module, "num_heads"):
            raise ConfigError(f'{name} has no num_heads to share out; the plan\'s style "heads" is for attentions')
        for kind in _KINDS_OF_HEADS:
            if (heads := getattr(module, kind, 0)) % parts:
                raise ConfigError(f"tensor {parts} does not divide {name}.{kind} = {heads}; use a divisor of it")
        return
    if isinstance(module, LoraLinear):
        if any(pair.magnitude is not None for pair in module.lora.values() if isinstance(pair, LowRank)):
            raise ConfigError(f"{name} has an adapter that learns lengths (DoRA), which is not cut; leave dora out")
        module = module.base
    wanted: type[nn.Module] = RMSNorm if style == "head_norm" else Linear
    if not isinstance(module, wanted) or type(module) not in (Linear, RMSNorm):
        what = "packed" if isinstance(module, PackedLinear) else f"a {type(module).__name__}"
        raise ConfigError(f"{name} is {what} and cannot be cut; parallelize a plain model, without packing")
    if isinstance(module, Linear):
        size = module.out_features if style in ("colwise", "gather") else module.in_features
        if size % parts:
            raise ConfigError(f"tensor {parts} does not divide the {size} channels of {name}; use a divisor of them")
        if owners[id(module.weight)] > 1:
            raise ConfigError(f"{name} shares its weight with another layer (tied embeddings) and cannot be cut")


def _swapped(module: nn.Module, style: Style, parts: DeviceMesh) -> nn.Module:
    if style == "head_norm":
        assert isinstance(module, RMSNorm)
        return HeadNorm(module, parts)
    if isinstance(module, LoraLinear):
        assert isinstance(module.base, Linear)
        module.base = TensorParallelLinear(module.base, style, parts)
        for adapter, pair in list(module.lora.items()):
            assert isinstance(pair, LowRank)
            module.lora.add_module(adapter, TensorParallelLowRank(pair, style, parts))
        return module
    assert isinstance(module, Linear)
    return TensorParallelLinear(module, style, parts)


def _plain(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, LoraLinear) else module


# --- layers -----------------------------------------------------------------------------------------------------------


class TensorParallelLinear(nn.Module):
    """This process's part of a linear layer, in the place of a `Linear`."""

    bias: nn.Parameter | None
    product: None = None  # its weight is not packed

    def __init__(self, linear: Linear, style: Style, parts: DeviceMesh) -> None:
        super().__init__()
        self.style, self.group = style, parts.get_group()
        self.rank, self.num_parts = parts.get_local_rank(), parts.size()
        self.by_outputs = style in ("colwise", "gather")
        self.weight = _cut(linear.weight, 0 if self.by_outputs else 1, parts)  # [N, K]
        bias = linear.bias
        if bias is not None and self.by_outputs:
            bias = _cut(bias, 0, parts)
        self.register_parameter("bias", bias)  # [N]; of a rowwise layer it is whole, and added once

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._local()
        if self.by_outputs:
            out = ops.linear(x, weight, bias)
            return out if self.style == "colwise" else _Gather.apply(out, self.group, self.rank, self.num_parts)
        if self.style == "slice":
            x = _Slice.apply(x, self.group, self.rank, self.num_parts)
        out = _Sum.apply(ops.linear(x, weight), self.group)
        return out if bias is None else out + bias

    def gelu(self, x: Tensor, approximate: ops.Approximation = "none") -> Tensor:
        """The layer and the GELU behind it, of this process's outputs."""
        assert self.style == "colwise"
        return ops.linear_gelu(x, *self._local(), approximate)

    def _local(self) -> tuple[Tensor, Tensor | None]:
        """[N/n, K] and [N/n], or [N, K/n] and [N]"""
        return local_part(self.weight), None if self.bias is None else local_part(self.bias)

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape
        return f"{inputs} → {outputs}, {self.style}, part {self.rank} of {self.num_parts}"


def _cut(parameter: Tensor, dim: int, parts: DeviceMesh) -> nn.Parameter:
    whole = distribute_tensor(parameter.detach(), parts, [Shard(dim)], src_data_rank=None)
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


class TensorParallelLowRank(LowRank):
    """This process's part of an adapter, beside its part of the layer.

    Beside a layer that is cut by its outputs, A is whole and B [N/n, R]; beside one that is cut by its inputs, A is
    [R, K/n] and B whole.
    """

    def __init__(self, pair: LowRank, style: Style, parts: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.rank, self.alpha, self.scale, self.dropout = pair.rank, pair.alpha, pair.scale, pair.dropout
        self.style, self.group = style, parts.get_group()
        self.index, self.num_parts = parts.get_local_rank(), parts.size()
        self.by_outputs = style in ("colwise", "gather")
        self.A = pair.A if self.by_outputs else _cut(pair.A, 1, parts)
        self.B = _cut(pair.B, 0, parts) if self.by_outputs else pair.B
        self.magnitude = None
        self.train(pair.training)

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.held()
        low = self.lower(x, A.to(x.dtype)) * self.scale
        return self._gathered(ops.linear(low, B.to(x.dtype)))

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        return out + self(x)

    def held(self) -> tuple[Tensor, Tensor]:
        return local_part(self.A), local_part(self.B)

    def lower(self, x: Tensor, A: Tensor) -> Tensor:
        if self.by_outputs:  # the gradients of x are partial here, as the layer's are, and those of A would be
            return ops.linear(x, _Enter.apply(A, self.group))
        if self.style == "slice":
            x = _Slice.apply(x, self.group, self.index, self.num_parts)
        return _Sum.apply(ops.linear(x, A), self.group)

    def plus_product(self, out: Tensor, low: Tensor, B: Tensor) -> Tensor:
        if self.style != "gather":
            return super().plus_product(out, low, B)
        return out + self._gathered(ops.linear(low, B))

    def _gathered(self, out: Tensor) -> Tensor:
        """The outputs of all side by side, where the layer gives those."""
        return _Gather.apply(out, self.group, self.index, self.num_parts) if self.style == "gather" else out


class HeadNorm(RMSNorm):
    """A norm over the channels of this process's heads: the gradients of its weight come from all processes."""

    def __init__(self, norm: RMSNorm, parts: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.weight, self.eps, self.group = norm.weight, norm.eps, parts.get_group()

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, _Enter.apply(self.weight, self.group), self.eps)


class _Entry:
    """A hook before a module's forward pass: its first argument is the same everywhere, its gradients are partial."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_Enter.apply(args[0], self.group), *args[1:])


# --- what the processes tell each other -------------------------------------------------------------------------------


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


def _side_by_side(x: Tensor, group: dist.ProcessGroup, parts: int) -> Tensor:
    pieces = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(parts)]
    dist.all_gather(pieces, x.contiguous(), group=group)
    return torch.cat(pieces, dim=-1)


class _Enter(torch.autograd.Function):
    """x → x; the gradient is the sum of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.group), None


class _Sum(torch.autograd.Function):
    """The sum of every process's x; each has the whole gradient already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    """[..., N/n] → [..., N]"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, rank: int, parts: int) -> Tensor:
        ctx.rank, ctx.parts = rank, parts
        return _side_by_side(x, group, parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0].chunk(ctx.parts, dim=-1)[ctx.rank], None, None, None


class _Slice(torch.autograd.Function):
    """[..., K] → [..., K/n]"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, rank: int, parts: int) -> Tensor:
        ctx.group, ctx.parts = group, parts
        return x.chunk(parts, dim=-1)[rank].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _side_by_side(grads[0], ctx.group, ctx.parts), None, None, None
