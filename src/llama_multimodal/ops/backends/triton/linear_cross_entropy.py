"""LM head and cross-entropy over blocks of tokens and vocabulary: logits exist for one block at a time.

The products are torch's. A kernel reads a block of logits once and keeps each token's running maximum and sum (online
softmax, Milakov and Gimelshein 2018); when a token has met the whole vocabulary, a second kernel turns logits into
their gradients in place. Where the vocabulary is several blocks, their logits are computed twice. That is cheaper than
blocks of few tokens with the whole vocabulary: the gradient of the weight, hundreds of megabytes, is then written once
for every block of tokens, and there is mostly one.

Shapes: T tokens · E hidden size · V vocabulary · R tokens of a block · C columns of a block, a part of the vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..._dispatch import register
from ..operators import define, differentiate
from .library import WIDE, launch, power, refused, refused_indices

_BLOCK_LOGITS = 2**26  # held at once: 128 MB in bf16
_BLOCK_TOKENS = 8192


@triton.jit(do_not_specialize=["first"])
def _meet(
    logits_ptr,  # [R, C]
    labels_ptr,  # [R]
    largest_ptr,  # [R], of the logits met so far
    total_ptr,  # [R], Σ exp(logit - largest)
    wanted_ptr,  # [R], the label's own logit
    first,  # the block's first column, in the vocabulary
    columns,  # C
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row) - first
    new_largest = tl.full([BLOCK], float("-inf"), WIDE)
    new_total = tl.zeros([BLOCK], WIDE)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < columns
        logits = tl.load(logits_ptr + row * columns + column, mask=mask, other=float("-inf")).to(WIDE)
        larger = tl.maximum(new_largest, logits)
        base = tl.where(larger == float("-inf"), 0.0, larger)
        new_total = new_total * tl.exp(new_largest - base) + tl.exp(logits - base)
        new_largest = larger
    old_largest, old_total = tl.load(largest_ptr + row), tl.load(total_ptr + row)
    largest = tl.maximum(tl.max(new_largest, 0), old_largest)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(new_total * tl.exp(new_largest - base), 0) + old_total * tl.exp(old_largest - base)
    tl.store(largest_ptr + row, largest)
    tl.store(total_ptr + row, total)
    if (label >= 0) & (label < columns):
        tl.store(wanted_ptr + row, tl.load(logits_ptr + row * columns + label).to(WIDE))


@triton.jit(do_not_specialize=["first", "ignored"])
def _slopes(
    logits_ptr,  # [R, C], becomes the loss's gradient
    labels_ptr,  # [R]
    largest_ptr,  # [R]
    total_ptr,
    first,
    columns,
    ignored,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    across = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    label = tl.load(labels_ptr + row)
    logits = tl.load(logits_ptr + row * columns + column, mask=mask, other=0.0).to(WIDE)
    slopes = tl.exp(logits - tl.load(largest_ptr + row)) / tl.load(total_ptr + row)
    slopes -= tl.where(column == label - first, 1.0, 0.0)
    slopes = tl.where(label == ignored, 0.0, slopes)
    tl.store(logits_ptr + row * columns + column, slopes.to(logits_ptr.dtype.element_ty), mask=mask)


def _empty(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, for_x: bool, for_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty((), dtype=wide),
        x.new_empty(x.shape if for_x else (0,)),
        weight.new_empty(weight.shape if for_weight else (0,)),
    )


@define(_empty)
def triton_linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, for_x: bool, for_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, and its gradients where they are asked for."""
    if not x.is_cuda:
        _check_labels(labels, weight.shape[0], ignore_index)
    wide = torch.promote_types(x.dtype, torch.float32)
    labels = labels.contiguous()
    loss = x.new_zeros((), dtype=wide)
    height = min(_BLOCK_TOKENS, max(1, x.shape[0]))
    x_grad = x.new_zeros(x.shape if for_x else (0,), dtype=wide)
    # Every part of the weight's gradient is written by the first block of tokens; only if there are more it is a sum.
    empty = weight.new_empty if x.shape[0] else weight.new_zeros
    weight_grad = empty(weight.shape if for_weight else (0,), dtype=wide if x.shape[0] > height else weight.dtype)
    width = max(1, min(weight.shape[0], _BLOCK_LOGITS // height))
    parts = [slice(first, first + width) for first in range(0, weight.shape[0], width)]
    for first in range(0, x.shape[0], height):
        rows = slice(first, first + height)
        part, wanted = x[rows], labels[rows]
        largest = x.new_full((len(part),), float("-inf"), dtype=wide)
        total = torch.zeros_like(largest)
        own = torch.full_like(largest, float("nan"))  # stays so where a label is not in the vocabulary
        for columns in parts:
            logits = F.linear(part, weight[columns])
            block = min(4096, power(logits.shape[1]))
            launch(
                _meet,
                len(part),
                logits,
                wanted,
                largest,
                total,
                own,
                columns.start,
                logits.shape[1],
                WIDE=WIDE[x.dtype],
                BLOCK=block,
                warps=max(1, min(8, block // 512)),
            )
        loss += (total.log() + largest - own).masked_fill(wanted == ignore_index, 0).sum()
        if not for_x and not for_weight:
            continue
        for columns in parts:
            if len(parts) > 1:
                logits = F.linear(part, weight[columns])
            block = min(2048, power(logits.shape[1]))
            launch(
                _slopes,
                len(part) * triton.cdiv(logits.shape[1], block),
                logits,
                wanted,
                largest,
                total,
                columns.start,
                logits.shape[1],
                ignore_index,
                WIDE=WIDE[x.dtype],
                BLOCK=block,
                warps=4,
            )
            if for_x:
                x_grad[rows] += logits @ weight[columns]
            if for_weight and first == 0:
                weight_grad[columns] = logits.t() @ part
            elif for_weight:
                weight_grad[columns] += logits.t() @ part
    return loss, x_grad.to(x.dtype), weight_grad.to(weight.dtype)


def _check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    """Raises:
    IndexError: a label outside the vocabulary (a GPU does not wait to look; the loss is NaN).
    """
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
    if wrong.numel():
        raise IndexError(f"linear_cross_entropy: label {int(wrong[0])}; takes 0 to {classes - 1}, and {ignore_index}")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.for_x, ctx.for_weight = inputs[4:]
    ctx.save_for_backward(output[1], output[2])


def _gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x_grad, weight_grad = ctx.saved_tensors
    scaled = (
        x_grad * grad.to(x_grad.dtype) if ctx.for_x else None,
        weight_grad * grad.to(weight_grad.dtype) if ctx.for_weight else None,
    )
    return *scaled, None, None, None, None


differentiate(triton_linear_cross_entropy, _gradients, _setup)


def _refuses(
    x: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> str | None:
    if reduction not in ("mean", "sum"):
        return f'reduction is "{reduction}"; takes "mean" or "sum"'
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        return f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}; takes [T, E] and [V, E]"
    if labels.shape != x.shape[:1]:
        return f"labels has shape {tuple(labels.shape)}; takes [T] = [{x.shape[0]}]"
    return refused(x=x, weight=weight) or refused_indices(x, labels=labels)


@register("linear_cross_entropy", "triton", refuses=_refuses, differentiable=True)
def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    wanted = torch.is_grad_enabled()
    loss, _, _ = triton_linear_cross_entropy(
        x, weight, labels, ignore_index, wanted and x.requires_grad, wanted and weight.requires_grad
    )
    return loss / (labels != ignore_index).sum().clamp(min=1) if reduction == "mean" else loss
