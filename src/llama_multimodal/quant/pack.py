"""Pack a model's linear layers: bf16 as it is, int8 or int4 with a scale for every group of a row.

Shapes: N outputs · K inputs · G values of a group
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import ConfigError
from ..models import VisionLanguageModel
from ..models.layers import Linear, Projections
from ..ops import Format, PackedWeight


class PackedLinear(nn.Module):
    """A linear layer with a packed weight [N, K], or several of them whose outputs lie side by side.

    Stands in for a `Linear` (parts None), or for `Projections` (parts: how many outputs each layer has).
    """

    values: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None, parts: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.format, self.shape, self.group, self.layout = weight.format, weight.shape, weight.group, weight.layout
        self.parts = parts
        for name, tensor in (("values", weight.values), ("scales", weight.scales), ("zeros", weight.zeros)):
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        weight = PackedWeight(self.format, self.shape, self.values, self.scales, self.zeros, self.group, self.layout)
        out = ops.packed_linear(x, weight, self.bias)
        return out if self.parts is None else out.split(self.parts, dim=-1)

    def extra_repr(self) -> str:
        return f"{self.shape[1]} → {self.parts or self.shape[0]}, {self.format}"


@torch.no_grad()
def pack(
    model: VisionLanguageModel,
    format: Format,
    *,
    group: int = 32,
    symmetric: bool = True,
    lm_head: Format | None = None,
) -> VisionLanguageModel:
    """Pack the decoder's linear layers in place, each as soon as its plain weight can be freed; returns the model.

    Queries, keys and values become one product, gate and up another. The vision encoder and the projector run once an
    image over many rows, where a plain product is faster: they stay as they are.

    format: "bf16" loses nothing on a bf16 model. group: values that share a scale. lm_head: the LM head's format, which
    is the one that hurts most; None takes `format`.

    Raises:
        ConfigError: a width that does not divide into groups, or weights that are packed already.
    """
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ConfigError("the model's weights are packed already; load it again to pack it otherwise")
    for parent in [m for m in model.decoder.modules() if not isinstance(m, Linear | Projections)]:
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear | Projections):
                wanted = lm_head or format if child is model.decoder.lm_head else format
                setattr(parent, name, _packed(child, wanted, group, symmetric))
    return model


def _packed(layer: Linear | Projections, format: Format, group: int, symmetric: bool) -> PackedLinear:
    linears = [layer] if isinstance(layer, Linear) else [x for x in layer.children() if isinstance(x, Linear)]
    weight = torch.cat([x.weight for x in linears])
    try:
        packed = ops.pack_weight(weight, format, group=group, symmetric=symmetric)
    except ValueError as error:
        raise ConfigError(f"{error}; choose another group or format") from error
    parts = tuple(x.out_features for x in linears) if isinstance(layer, Projections) else None
    return PackedLinear(ops.prepare_weight(packed), linears[0].bias, parts)
