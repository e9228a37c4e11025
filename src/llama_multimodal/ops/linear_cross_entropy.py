"""The language-model head and the cross-entropy behind it, in chunks of tokens: no [T, V] logits are ever held.

The idea is that of Cut Cross-Entropy (Wijmans et al. 2024) and Liger Kernel: the loss is a scalar, so its gradients can
be taken chunk by chunk in the forward pass, and the logits of a chunk thrown away.

Shapes: T tokens · E hidden size · V vocabulary
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch

_CHUNK_LOGITS = 2**23  # values held at once: 32 MB in fp32


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """`cross_entropy(x · weightᵀ, labels)`; x: [T, E], weight: [V, E], labels: int64 [T] → fp32 scalar.

    Tokens whose label is `ignore_index` count for nothing; the mean over no token at all is 0. Products run in x's
    dtype, sums and the loss in fp32 (fp64 for fp64).
    """
    return _dispatch.call(
        "linear_cross_entropy", _torch, x, weight, labels, ignore_index=ignore_index, reduction=reduction
    )


def _torch(x: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int, reduction: str) -> Tensor:
    kept = labels != ignore_index
    summed = _Chunked.apply(x[kept], weight, labels[kept])
    return summed / kept.sum().clamp(min=1) if reduction == "mean" else summed


class _Chunked(torch.autograd.Function):
    """The summed loss; gradients are ready when the forward pass ends, and only scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        for_x, for_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if for_x else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if for_weight else None
        total = x.new_zeros((), dtype=wide)
        rows = max(1, _CHUNK_LOGITS // weight.shape[0])
        for first in range(0, x.shape[0], rows):
            part, wanted = x[first : first + rows], labels[first : first + rows]
            scores = F.log_softmax(F.linear(part, weight), dim=-1, dtype=wide)
            total += F.nll_loss(scores, wanted, reduction="sum")
            if not for_x and not for_weight:
                continue
            slope = scores.exp_()  # d loss / d logits = softmax - one-hot
            slope[torch.arange(len(wanted), device=x.device), wanted] -= 1
            slope = slope.to(x.dtype)
            if grad_x is not None:
                grad_x[first : first + rows] = slope @ weight
            if grad_weight is not None:
                grad_weight += slope.T @ part
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        grad_x, grad_weight = ctx.saved_tensors
        return (
            None if grad_x is None else grad_x * grad.to(grad_x.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
        )
