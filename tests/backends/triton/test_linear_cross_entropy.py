"""LM head and loss against fp64: blocks of tokens and vocabulary of every size, ignored labels, gradients."""

from __future__ import annotations

import importlib

import pytest
import torch

from backends.references import FLOATS, close, linear_cross_entropy, name_of, randn
from llama_multimodal import ops

BLOCKS = {
    "one block": (2**26, 8192),
    "parts of the vocabulary": (7 * 40, 8192),
    "both": (3 * 17, 3),
    "tokens": (800, 4),
}
"""logits held at once, tokens of a block"""


def set_blocks(monkeypatch: pytest.MonkeyPatch, blocks: str) -> None:
    module = importlib.import_module("llama_multimodal.ops.backends.triton.linear_cross_entropy")
    monkeypatch.setattr(module, "_BLOCK_LOGITS", BLOCKS[blocks][0])
    monkeypatch.setattr(module, "_BLOCK_TOKENS", BLOCKS[blocks][1])


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("blocks, reduction", [*((blocks, "mean") for blocks in BLOCKS), ("both", "sum")])
@pytest.mark.parametrize("shape", [(7, 5, 11), (7, 32, 150), (1, 3, 5)], ids=str)
def test_loss_and_gradients(
    dtype: torch.dtype,
    reduction: str,
    blocks: str,
    shape: tuple[int, ...],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_blocks(monkeypatch, blocks)
    tokens, size, classes = shape
    x, weight = (
        randn(tokens, size, dtype=dtype, device=device),
        randn(classes, size, dtype=dtype, seed=1, device=device),
    )
    x, weight = x / size**0.5, weight * 2
    labels = torch.randint(0, classes, (tokens,), generator=torch.Generator().manual_seed(tokens)).to(device)
    labels[-1] = classes - 1
    labels[1:4:2] = 1000
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    ours = ops.linear_cross_entropy(*leaves, labels, ignore_index=1000, reduction=reduction)
    grads = torch.autograd.grad(2 * ours, leaves)
    wide = [x.double().requires_grad_(), weight.double().requires_grad_()]
    expected = linear_cross_entropy(*wide, labels, 1000, reduction)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)
    for got, want in zip(grads, torch.autograd.grad(2 * expected, wide)):
        close(got, want, dtype, scale=2)
    with torch.no_grad():
        again = ops.linear_cross_entropy(*leaves, labels, ignore_index=1000, reduction=reduction)
    assert torch.equal(again, ours.detach())


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_one_gradient_alone(frozen: str, device: str) -> None:
    x, weight = randn(6, 5, device=device), randn(11, 5, seed=1, device=device)
    labels = torch.tensor([3, -100, 0, 10, 3, 7], device=device)
    leaf = (weight if frozen == "x" else x).requires_grad_()
    (ours,) = torch.autograd.grad(ops.linear_cross_entropy(x, weight, labels), leaf)
    wide = [x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    expected = torch.autograd.grad(linear_cross_entropy(*wide, labels, -100, "mean"), wide)[int(frozen == "x")]
    close(ours, expected, torch.float32)


@pytest.mark.parametrize("tokens", [0, 2])
def test_no_token_that_counts(tokens: int, device: str) -> None:
    x, weight = randn(tokens, 5, device=device).requires_grad_(), randn(11, 5, seed=1, device=device).requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, torch.full((tokens,), -100, device=device))
    for grad in torch.autograd.grad(loss, (x, weight)):
        assert not grad.any()
    assert loss == 0


def test_a_label_outside_the_vocabulary(device: str) -> None:
    x, weight = randn(2, 5, device=device), randn(11, 5, seed=1, device=device)
    for wrong in (-1, 11):
        labels = torch.tensor([0, wrong], device=device)
        if device == "cpu":
            with pytest.raises(IndexError, match=f"label {wrong}; takes 0 to 10, and -100"):
                ops.linear_cross_entropy(x, weight, labels)
        else:
            assert ops.linear_cross_entropy(x, weight, labels).isnan()


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["one block", "both"])
def test_gradients(blocks: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_blocks(monkeypatch, blocks)
    x, weight = (randn(*shape, dtype=torch.float64, device=device).requires_grad_() for shape in ((4, 3), (6, 3)))
    labels = torch.tensor([3, -100, 0, 5], device=device)
    assert torch.autograd.gradcheck(lambda x, w: ops.linear_cross_entropy(x, w, labels), (x, weight))
