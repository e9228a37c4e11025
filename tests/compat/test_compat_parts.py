"""The original's parts against plain torch in fp64."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_compat import TEXT, config, model, pixels
from torch import Tensor

from llama_multimodal import compat
from llama_multimodal.compat import (
    FeedForward,
    GroupQueryAttention,
    Linear_LORA,
    LLAMARMSNorm,
    LLAMARotaryEmbedding,
    MultiModalProjector,
    TransformerBlock,
)
from llama_multimodal.errors import ConfigError

NEAR = {"atol": 1e-6, "rtol": 1e-5}  # angles are in fp32


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normed(value: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return value / (value.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(value: Tensor, positions: Tensor, base: float) -> Tensor:
    """value: [B, T, H, D], the pairs i and i + D/2."""
    dim = value.shape[3]
    freqs = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = (positions[..., None] * freqs)[:, :, None]
    first, second = value.chunk(2, dim=-1)
    turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    return torch.cat(turned, dim=-1)


def attended(value: Tensor, attention: Any, positions: Tensor, base: float) -> Tensor:
    """Causal attention with 4 query heads, 2 key heads, keys repeated."""
    q, k, v = (value @ getattr(attention.qkv, name).weight.T for name in ("q_proj", "k_proj", "v_proj"))
    q, k, v = (part.unflatten(2, (-1, 8)) for part in (q, k, v))
    q, k = rotated(q, positions, base), rotated(k, positions, base)
    k, v = (part.repeat_interleave(2, dim=2) for part in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(8)
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    mixed = torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)
    return mixed.flatten(2) @ attention.o_proj.weight.T


def fed(value: Tensor, mlp: Any) -> Tensor:
    gate, up = mlp.gate_up.gate_proj.weight, mlp.gate_up.up_proj.weight
    return (F.silu(value @ gate.T) * (value @ up.T)) @ mlp.down_proj.weight.T


def test_norm() -> None:
    norm = LLAMARMSNorm(6, eps=0.01).double()
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x(2, 3, 6)), normed(x(2, 3, 6), norm.weight, 0.01))
    assert LLAMARMSNorm(6).eps == 1e-5


def test_rotary() -> None:
    rotary, value = LLAMARotaryEmbedding(8, max_position_embeddings=20, base=100.0), x(2, 3, 4, 8)
    positions = torch.tensor([[0, 1, 2], [19, 3, 7]])
    torch.testing.assert_close(rotary(value, positions), rotated(value, positions, 100.0), **NEAR)
    torch.testing.assert_close(rotary(value), rotated(value, torch.arange(3).expand(2, 3), 100.0), **NEAR)
    assert not rotary.state_dict()
    with pytest.raises(ConfigError, match="position 20 is past max_position_embeddings, 20"):
        rotary(value, positions + 1)
    with pytest.raises(ConfigError, match="position 20 is past"):
        rotary(x(1, 21, 1, 8))


def test_feed_forward() -> None:
    ffn = FeedForward(6, 10).double()
    assert [tuple(layer.weight.shape) for layer in (ffn.w1, ffn.w2, ffn.w3)] == [(10, 6), (6, 10), (10, 6)]
    value = x(2, 3, 6)
    by_name = (F.silu(value @ ffn.w1.weight.T) * (value @ ffn.w3.weight.T)) @ ffn.w2.weight.T
    torch.testing.assert_close(ffn(value), by_name)
    assert len(list(ffn.parameters())) == 3


@pytest.mark.parametrize("given", [TEXT, config(), config().text_config])
def test_attention(given: Any) -> None:
    torch.manual_seed(0)
    part, value = GroupQueryAttention(given).double(), x(2, 5, 32)
    positions = torch.tensor([[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]])
    expected = attended(value, part.attention, positions, 10000.0)
    torch.testing.assert_close(part(value, positions), expected, **NEAR)
    torch.testing.assert_close(part(value)[0], expected[0], **NEAR)
    # Only how far tokens lie apart counts, so that the second row does not need its positions.
    torch.testing.assert_close(part(value)[1], expected[1], **NEAR)


def test_block() -> None:
    torch.manual_seed(0)
    part, value = TransformerBlock(TEXT).double(), x(2, 5, 32)
    block = part.block
    for norm in (block.input_norm, block.post_attention_norm):
        torch.nn.init.normal_(norm.weight)
    positions = torch.arange(5).expand(2, 5)
    hidden = value + attended(normed(value, block.input_norm.weight), block.attention, positions, 10000.0)
    expected = hidden + fed(normed(hidden, block.post_attention_norm.weight), block.mlp)
    torch.testing.assert_close(part(value), expected, **NEAR)


def test_projector() -> None:
    torch.manual_seed(0)
    part, value = MultiModalProjector(config()).double(), x(2, 4, 24)
    first, second = part.mlp.fc1, part.mlp.fc2
    assert (first.weight.shape, second.weight.shape) == ((20, 24), (32, 20))
    inner = value @ first.weight.T + first.bias
    inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    torch.testing.assert_close(part(value), inner @ second.weight.T + second.bias)


@torch.no_grad()
def test_a_part_is_the_models_own() -> None:
    """Weights go from a model into a part and back."""
    made = model()
    part = TransformerBlock(made.config).eval()
    part.block.load_state_dict(made.model.decoder.layers[0].state_dict())
    seen: list[Tensor] = []
    made.model.decoder.layers[0].register_forward_hook(lambda module, given, out: seen.extend((given[0], out)))
    made(torch.tensor([[5, 6, 7]]))
    torch.testing.assert_close(part(seen[0]), seen[1])
    projector = MultiModalProjector(made.config)
    projector.mlp.load_state_dict(made.model.projector.state_dict())
    features = made.model.vision(pixels(1))
    assert torch.equal(projector(features), made.model.projector(features))


def test_refused() -> None:
    for part in (GroupQueryAttention(TEXT), TransformerBlock(TEXT)):
        with pytest.raises(ConfigError, match=r"x must be \[batch, seq, 32\]"):
            part(torch.ones(1, 2, 3))
        with pytest.raises(ConfigError, match=r"position_ids must be \[1, 2\]"):
            part(torch.ones(1, 2, 32), torch.arange(3))
    with pytest.raises(ConfigError, match="n_headz"):
        TransformerBlock({"n_headz": 2})


def test_lora_adds_to_a_frozen_layer() -> None:
    torch.manual_seed(0)
    part, value = Linear_LORA(6, 10, rank=3, alpha=12.0, bias=True), x(2, 3, 6).float()
    plain = F.linear(value, part.linear.weight, part.linear.bias)
    assert torch.equal(part(value), plain)  # nothing is added at first
    trained = {name: tuple(p.shape) for name, p in part.named_parameters() if p.requires_grad}
    assert trained == {"lora.default.A": (3, 6), "lora.default.B": (10, 3)}
    a, b = part.lora["default"].A, part.lora["default"].B
    torch.nn.init.normal_(b)
    torch.testing.assert_close(part(value), plain + 12 / 3 * (value @ a.T) @ b.T, atol=1e-5, rtol=1e-5)
    part(value).sum().backward()
    assert a.grad.any() and b.grad.any() and part.linear.weight.grad is None
    assert Linear_LORA(4, 5).linear.bias is None


def test_lora_takes_another_layer() -> None:
    part, other = Linear_LORA(6, 10, rank=3, alpha=12.0), torch.nn.Linear(6, 10)
    part.linear = other
    value = x(2, 6).float()
    assert part.linear is other and torch.equal(part(value), other(value)) and not other.weight.requires_grad
    assert [name for name, _ in part.named_children()] == ["base", "lora"]
    part.linear.weight = torch.nn.Parameter(torch.zeros(10, 6))
    assert torch.equal(part(value), other.bias.expand(2, 10))
    for wrong in (torch.nn.Linear(6, 9), torch.nn.Conv1d(6, 10, 1), None):
        with pytest.raises(ConfigError, match=r"a weight \[10, 6\]"):
            part.linear = wrong
    with pytest.raises(ConfigError, match="ranks must be whole numbers"):
        Linear_LORA(6, 10, rank=0)


def test_lora_drops_inputs_of_its_own_while_training() -> None:
    torch.manual_seed(0)
    part, value = Linear_LORA(6, 10, rank=3, alpha=3.0, dropout=0.5), torch.ones(4000, 6)
    torch.nn.init.normal_(part.lora["default"].B)
    plain, whole = F.linear(value, part.linear.weight), part.eval()(value)
    added = part.train()(value) - plain
    assert added.std(0).min() > 0.01
    torch.testing.assert_close(added.mean(0), (whole - plain)[0], atol=0.1, rtol=0.1)
    assert torch.equal(part.eval()(value), whole)


@torch.no_grad()
def test_lora_in_a_model() -> None:
    """In the place of any of its layers, and in decoding with a cache too."""
    made, ids = model(), torch.tensor([[5, 6, 7]])
    before = made(ids).logits
    attention = made.model.decoder.layers[0].attention
    part = Linear_LORA(32, 32, rank=2, alpha=4.0)
    part.linear = attention.o_proj
    attention.o_proj = part
    assert torch.equal(made(ids).logits, before)
    torch.nn.init.normal_(part.lora["default"].B)
    after = made(ids).logits
    assert (after - before).abs().max() > 1e-2
    merged = part.linear.weight + 2 * part.lora["default"].B @ part.lora["default"].A
    attention.o_proj = torch.nn.Linear(32, 32, bias=False)
    attention.o_proj.weight = torch.nn.Parameter(merged)
    torch.testing.assert_close(made(ids).logits, after, atol=1e-4, rtol=1e-4)


def test_every_name_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "compat.md").read_text(encoding="utf-8")
    names = set(compat.__all__) - {"MllamaOutput", "ProcessorOutput"}  # which calls give, and nobody makes
    assert sorted(name for name in names if not re.search(rf"`[^`]*\b{name}\b", text)) == []
    assert all(hasattr(compat, name) for name in compat.__all__)
