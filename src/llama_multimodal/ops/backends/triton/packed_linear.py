"""Products of a few rows with int8 and int4 weights, read in the plain layout and widened in registers.

A program takes some of the weight's rows and walks along their columns, a number of whole groups at a step, with the
weights of the next steps on their way. It reads them as words of 32 bits, eight or four values each; x is split in
the same way, so that each value meets its own factor without leaving its register. One row of x is multiplied and
added in fp32; several go to the tensor cores, with weights rounded to x's dtype as the op's reference rounds them.

Shapes: N outputs · K inputs · G values of a group · T rows of x
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._dispatch import register
from ...packed_linear import INTEGERS, PackedWeight
from ..operators import define, more_rows_than, multiprocessors
from .library import WIDE, launch, power, refused, upcasts, widen

_MOST_ROWS = 8
_MOST_GROUP = 1024
_WARPS = tl.constexpr(4)


@triton.jit
def _multiply(
    total, words, x, scales, zeros,
    AT: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Add the products of one value of every word.

    words: [BLOCK, GROUPS, WIDTH]; x: [ROWS, GROUPS, WIDTH], what the words' values AT are multiplied with;
    scales, zeros: [BLOCK, GROUPS]; total: [_WARPS, BLOCK, ROWS] by tensor cores, else the words' shape, not yet scaled
    """
    values = (words >> 4 * AT) & 15 if BITS == 4 else (words << 24 - 8 * AT) >> 24
    values = values.to(WIDE)
    if DOT:
        weight = ((values - zeros[:, :, None]) * scales[:, :, None]).to(x.dtype)
        # A share of the columns for each warp: divided by rows, every warp would widen all of the weights.
        weight = tl.reshape(weight, [weight.shape[0], _WARPS, weight.shape[1] * weight.shape[2] // _WARPS])
        x = tl.reshape(x, [x.shape[0], _WARPS, x.shape[1] * x.shape[2] // _WARPS])
        weight, x = widen(tl.permute(weight, 1, 0, 2), UPCAST), widen(tl.permute(x, 1, 2, 0), UPCAST)
        return tl.dot(weight, x, total, input_precision="ieee", out_dtype=WIDE)
    else:
        return total + values * x


@triton.jit
def _multiply_two(
    total, words, x, scales, zeros,
    AT: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`_multiply` with the values AT and AT plus half a word's; x: [ROWS, GROUPS, WIDTH, 2]."""
    first, second = tl.split(x)
    total = _multiply(total, words, first, scales, zeros, AT, BITS, WIDE, UPCAST, DOT)
    return _multiply(total, words, second, scales, zeros, AT + 16 // BITS, BITS, WIDE, UPCAST, DOT)


@triton.jit
def _halves(x):
    """The even and the odd elements of the last axis."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], x.shape[3] // 2, 2]))


@triton.jit
def _packed_linear(
    x_ptr,  # [T, K]
    words_ptr,  # [N, K·BITS/32]
    scales_ptr,  # [N, K/G]
    zeros_ptr,  # [N, K/G]; scales_ptr again where ZEROS is off
    bias_ptr,  # [N]; x_ptr again where BIAS is off
    out_ptr,  # [T, N]
    outputs,  # N
    groups,  # K/G
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
    BITS: tl.constexpr,  # 4 or 8
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    DOT: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,  # T, padded
    BLOCK: tl.constexpr,  # rows of the weight
    GROUPS: tl.constexpr,  # of a step
    WORDS: tl.constexpr,  # of a group
    WIDTH: tl.constexpr,  # WORDS, padded
):
    PER: tl.constexpr = 32 // BITS
    output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    output_at = output.to(tl.int64)[:, None] * groups
    row = tl.arange(0, ROWS)[:, None, None]
    place = tl.arange(0, WIDTH)[None, None, :]
    total = tl.zeros([_WARPS, BLOCK, ROWS], WIDE) if DOT else tl.zeros([BLOCK, GROUPS, WIDTH], WIDE)
    for first in tl.range(0, groups, GROUPS, num_stages=4):
        group = first + tl.arange(0, GROUPS)
        held = (output < outputs)[:, None] & (group < groups)[None, :]
        at = output_at + group[None, :]
        words = tl.load(words_ptr + at[:, :, None] * WORDS + place, mask=held[:, :, None] & (place < WORDS), other=0)
        scales = tl.load(scales_ptr + at, mask=held, other=0.0).to(WIDE)
        if ZEROS:
            zeros = tl.load(zeros_ptr + at, mask=held, other=0).to(WIDE)
        else:
            zeros = tl.full([BLOCK, GROUPS], 8 if BITS == 4 else 0, WIDE)
        mask = (row < T) & (group < groups)[None, :, None] & (place < WORDS)
        x_at = ((row * groups + group[None, :, None]) * WORDS + place) * PER
        x = tl.load(x_ptr + x_at[:, :, :, None] + tl.arange(0, PER), mask=mask[:, :, :, None], other=0.0)
        if DOT:
            part = total
        else:  # scale and zero concern whole groups, so they are applied to sums
            x = x.to(WIDE)
            part = -zeros[:, :, None] * tl.sum(x, 3)
        even, odd = _halves(x)
        if BITS == 4:
            even, even_2 = _halves(even)
            odd, odd_3 = _halves(odd)
            part = _multiply_two(part, words, even_2, scales, zeros, 2, BITS, WIDE, UPCAST, DOT)
            part = _multiply_two(part, words, odd_3, scales, zeros, 3, BITS, WIDE, UPCAST, DOT)
        part = _multiply_two(part, words, even, scales, zeros, 0, BITS, WIDE, UPCAST, DOT)
        part = _multiply_two(part, words, odd, scales, zeros, 1, BITS, WIDE, UPCAST, DOT)
        total = part if DOT else total + part * scales[:, :, None]
    total = tl.trans(tl.sum(total, 0)) if DOT else tl.sum(tl.sum(total, 2), 1)[None, :]  # [ROWS, BLOCK]
    if BIAS:
        total += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(WIDE)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    mask = (row < T) & (output < outputs)[None, :]
    tl.store(out_ptr + row * outputs + output[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


def _empty(x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


@define(_empty)
def triton_packed_linear(
    x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    if values.storage_offset() % 4:
        raise ValueError(
            f"packed_linear: packed.values starts {values.storage_offset()} bytes into its storage;"
            " takes a multiple of four: pass values.clone()"
        )
    out = _empty(x, values, scales, zeros, bias, group)
    outputs, columns = values.shape[0], x.shape[-1]
    rows = x.numel() // columns
    bits = 4 if values.dtype == torch.uint8 else 8
    words = group * bits // 32
    # About two programs a multiprocessor, and blocks of 8 KB: enough bytes on their way to keep the memory busy.
    block = max(16 if rows > 1 else 4, min(16, power(outputs // (2 * multiprocessors(x.device)))))
    groups = max(1, min(power(columns // group), (1024 if rows > 1 else 2048) // (block * power(words))))
    launch(
        _packed_linear,
        triton.cdiv(outputs, block),
        x.contiguous(),
        values.contiguous().view(torch.int32),
        scales.contiguous(),
        scales if zeros is None else zeros.contiguous(),
        x if bias is None else bias.contiguous(),
        out,
        outputs,
        columns // group,
        WIDE=WIDE[x.dtype],
        UPCAST=upcasts(x),
        BITS=bits,
        ZEROS=zeros is not None,
        BIAS=bias is not None,
        DOT=rows > 1,
        T=rows,
        ROWS=16 if rows > 1 else 1,
        BLOCK=block,
        # A warp's product is 16 columns deep at least.
        GROUPS=max(groups, triton.cdiv(16 * _WARPS.value, power(words))) if rows > 1 else groups,
        WORDS=words,
        WIDTH=power(words),
        warps=_WARPS.value,
    )
    return out


def _refuses(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, int8_activations: bool = False) -> str | None:
    if int8_activations:
        return "takes activations as they are, not rounded to 8 bits"
    if packed.format not in INTEGERS or packed.layout != "plain" or packed.scales is None:
        return f'packed has format "{packed.format}" in layout "{packed.layout}"; takes int8 and int4 in the plain one'
    if x.ndim == 0 or x.shape[-1] != packed.shape[1]:
        return f"x has shape {tuple(x.shape)}; takes [..., K] for a weight of {packed.shape}"
    per_word = 8 if packed.format == "int4" else 4
    if packed.group > _MOST_GROUP or packed.group % per_word:
        return f"packed has groups of {packed.group}; takes multiples of {per_word} up to {_MOST_GROUP}"
    if packed.values.device != x.device:
        return f"packed is on {packed.values.device}, x on {x.device}; takes one device"
    if bias is not None and bias.shape != packed.shape[:1]:
        return f"bias has shape {tuple(bias.shape)}; takes [N] = [{packed.shape[0]}]"
    return refused(x=x, bias=bias)


@register("packed_linear", "triton", refuses=_refuses, leaves=more_rows_than(_MOST_ROWS))
def packed_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None = None, int8_activations: bool = False
) -> Tensor:
    assert packed.scales is not None
    return triton_packed_linear(x, packed.values, packed.scales, packed.zeros, bias, packed.group)
