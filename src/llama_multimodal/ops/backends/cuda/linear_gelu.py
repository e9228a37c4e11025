"""`ops.linear_gelu`: the product by torch, bias and GELU in one pass over it by csrc/linear_gelu.cu.

Shapes: K inputs · N outputs
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._dispatch import register
from ...linear_gelu import Approximation
from ..operators import define
from .library import DTYPES, INT, INT64, POINTER, Launcher, refused

_launch = Launcher("bias_gelu", *[POINTER] * 2, *[INT64] * 2, INT, INT)


def _refuses(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: Approximation = "none") -> str | None:
    if approximate not in ("none", "tanh"):
        return f'approximate is {approximate!r}; takes "none" and "tanh"'
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        return f"x has shape {list(x.shape)}, weight {list(weight.shape)}; takes [..., K] and [N, K]"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"bias has shape {list(bias.shape)}; takes [N], here [{weight.shape[0]}]"
    return refused(x=x, weight=weight, bias=bias)


@define(lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])))
def cuda_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    product = F.linear(x, weight).contiguous()
    if product.numel():
        columns = product.shape[-1]
        bias = None if bias is None else bias.contiguous()
        _launch(
            x.device, product.data_ptr(), None if bias is None else bias.data_ptr(), product.numel() // columns,
            columns, approximate == "tanh", DTYPES[x.dtype],
        )  # fmt: skip
    return product


@register("linear_gelu", "cuda", refuses=_refuses, differentiable=True)
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: Approximation = "none") -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        # The backward needs the product as it was before the GELU, so training runs as torch does it.
        return F.gelu(F.linear(x, weight, bias), approximate=approximate)
    return cuda_linear_gelu(x, weight, bias, approximate)
