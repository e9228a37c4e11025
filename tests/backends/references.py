"""Plain fp64 computations that every backend's kernels are held against, and the values to try them on.

Shapes: B rows · H query heads · Hkv key heads · T tokens · C slots · D head dim · E hidden size · V vocabulary
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> Tensor:
    """Values that `dtype` holds exactly; other shapes and seeds give others."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def close(ours: Tensor, reference: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Every element, within the dtype's tolerance (`scale` times it); the reference is fp64 from the same inputs."""
    assert ours.dtype == dtype and reference.dtype == torch.float64 and ours.shape == reference.shape
    tolerance = scale * TOLERANCE[dtype]
    torch.testing.assert_close(ours.double().cpu(), reference.cpu(), rtol=tolerance, atol=tolerance)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight.double()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x: [B, H, T, D], cos and sin: [B, T, D/2]; each pair as a complex number, turned by one."""
    x, turn = x.double(), torch.complex(cos.double(), sin.double())[:, None]
    if interleaved:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
    turned = torch.complex(*x.chunk(2, dim=-1)) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate.double() / (1 + (-gate.double()).exp()) * up.double()


def gelu(x: Tensor, approximate: str) -> Tensor:
    x = x.double()
    if approximate == "none":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """One query head over some keys; q: [D], k, v: [C, D], bias: [C] → [D], zeros where there are no keys."""
    if k.shape[0] == 0:
        return q.double() * 0 + k.double().sum(0) + v.double().sum(0)
    scores = k.double() @ q.double() / math.sqrt(q.shape[0])
    return torch.softmax(scores if bias is None else scores + bias.double(), dim=0) @ v.double()


def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, key_bias: Tensor | None = None) -> Tensor:
    """q: [B, H, D]; k, v: [B, Hkv, C, D]; lengths: [B]; key_bias: [C] → [B, H, D]"""
    group = q.shape[1] // k.shape[1]
    rows = []
    for b, n in enumerate(lengths.tolist()):
        bias = None if key_bias is None else key_bias[:n]
        heads = [attend(q[b, h], k[b, h // group, :n], v[b, h // group, :n], bias) for h in range(q.shape[1])]
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def unpaged(cache: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    """The dense keys or values [B, Hkv, C, D] that a paged cache [N, S, Hkv, D] holds, zeros past the lengths."""
    slots = cache.shape[1]
    most = int(lengths.max())
    dense = cache.new_zeros(len(lengths), cache.shape[2], most, cache.shape[3])
    for b, n in enumerate(lengths.tolist()):
        for p in range(n):
            dense[b, :, p] = cache[int(block_table[b, p // slots]), p % slots]
    return dense


def cross_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """q: [B, H, T, D]; k, v: [Hkv, S, D]; table: [B, T, 2], first and end of each token's keys."""
    group = q.shape[1] // k.shape[0]
    rows = []
    for b, ranges in enumerate(table.tolist()):
        tokens = []
        for t, (first, end) in enumerate(ranges):
            keys, values = k[:, first:end], v[:, first:end]
            heads = [attend(q[b, h, t], keys[h // group], values[h // group]) for h in range(q.shape[1])]
            tokens.append(torch.stack(heads))
        rows.append(torch.stack(tokens, dim=1))
    return torch.stack(rows)


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    logits = x.double() @ weight.double().T
    kept = labels != ignore_index
    losses = [logits[t].logsumexp(0) - logits[t, labels[t]] for t in kept.nonzero()[:, 0].tolist()]
    total = torch.stack(losses).sum() if losses else (logits * 0).sum()
    return total / max(1, int(kept.sum())) if reduction == "mean" else total


def poisoned(x: Tensor) -> Tensor:
    """The same values as every other row of a buffer of NaN, with NaN behind each row: strides, and traps for reads."""
    buffer = x.new_full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1] + 3), float("nan"))
    view = buffer[..., ::2, : x.shape[-1]]
    view.copy_(x)
    return view
