"""`ops.apply_rope` by csrc/rope.cu.

Shapes: B rows · H query heads · Hkv key heads · T tokens · D head dim · P rows of the table
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._dispatch import register
from ..operators import define, differentiate
from .library import DTYPES, FLOAT, INT, INT64, POINTER, Launcher, empty_like, refused

_launch = Launcher("apply_rope", *[POINTER] * 7, *[INT64] * 14, FLOAT, INT, INT)


def _refuses(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False
) -> str | None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3] or q.shape[3] % 2:
        return f"q has shape {list(q.shape)}, k {list(k.shape)}; takes [B, H, T, D] and [B, Hkv, T, D] with an even D"
    batch, _, tokens, dim = q.shape
    for name, x in (("cos", cos), ("sin", sin)):
        if x.dtype != torch.float32 or x.device != q.device:
            return f"{name} is {x.dtype} on {x.device}; takes float32 on {q.device}, where q is"
        if x.requires_grad and torch.is_grad_enabled():
            return f"{name} wants a gradient, which the kernel does not compute"
        if positions is None and (x.ndim != 3 or x.shape[0] not in (1, batch) or x.shape[1:] != (tokens, dim // 2)):
            return f"{name} has shape {list(x.shape)}; takes [B, T, D/2], here [{batch}, {tokens}, {dim // 2}]"
        if positions is not None and (x.ndim != 2 or not x.shape[0] or x.shape[1] != dim // 2):
            return f"{name} has shape {list(x.shape)}; with positions it takes a table [P, D/2], D/2 = {dim // 2}"
    if cos.shape != sin.shape:
        return f"cos has shape {list(cos.shape)}, sin {list(sin.shape)}; takes one shape"
    if positions is not None and (positions.dtype != torch.int64 or positions.shape != (batch, tokens)):
        return f"positions is {positions.dtype} {list(positions.shape)}; takes int64 [B, T], here [{batch}, {tokens}]"
    if positions is not None and positions.device != q.device:
        return f"positions is on {positions.device}; takes {q.device}, where q is"
    return refused(q=q, k=k)


def _fake(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_like(q), empty_like(k)


@define(_fake)
def cuda_apply_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, back: bool
) -> tuple[Tensor, Tensor]:
    """back: turn the other way."""
    q_out, k_out = _fake(q, k)
    batch, heads, tokens, dim = q.shape
    if not batch * tokens * dim:
        return q_out, k_out
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    if positions is not None:
        positions = positions.contiguous()
    # A row of cos for each token, one for all batches where it is [1, T, D/2]; or the table's rows.
    row_step = 0 if positions is not None or cos.shape[0] == 1 else cos.stride(0)
    _launch(
        q.device, q.data_ptr(), k.data_ptr(), q_out.data_ptr(), k_out.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        None if positions is None else positions.data_ptr(), batch, heads, k.shape[1], tokens, dim, *q.stride()[:3],
        *k.stride()[:3], cos.shape[0], row_step, cos.stride(-2), -1.0 if back else 1.0, interleaved, DTYPES[q.dtype],
    )  # fmt: skip
    return q_out, k_out


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, positions, ctx.interleaved, ctx.back = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    turned = cuda_apply_rope(grad_q, grad_k, *ctx.saved_tensors, ctx.interleaved, not ctx.back)
    return *turned, None, None, None, None, None


differentiate(cuda_apply_rope, _backward, _keep)


@register("apply_rope", "cuda", refuses=_refuses, differentiable=True)
def apply_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    return cuda_apply_rope(q, k, cos, sin, positions, interleaved, False)
