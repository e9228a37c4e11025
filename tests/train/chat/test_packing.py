"""Micro-batches of conversations: packed rows give what each gives alone, and nothing depends on how a step is cut."""

from __future__ import annotations

import copy
import dataclasses
import random

import pytest
import torch
from small_model import CONFIG, IMAGE, random_model

from llama_multimodal import ops
from llama_multimodal.inputs import ImageLayout
from llama_multimodal.models.llama import segment_lengths
from llama_multimodal.train.chat.batches import MicroBatch, micro_batches
from llama_multimodal.train.chat.encode import Example, microbatch
from llama_multimodal.train.chat.model import summed_loss
from llama_multimodal.train.chat.recipe import BatchConfig
from llama_multimodal.train.loader import IGNORED
from llama_multimodal.train.recompute import recompute_blocks


def example(number: int, grids: list[tuple[int, int]], length: int) -> Example:
    """Random tokens, an image token for each picture after the first two, and some tokens that are learnt."""
    draw = random.Random(number)
    tokens = [draw.randrange(60) for _ in range(length)]
    for i in range(len(grids)):
        tokens[2 + 3 * i] = IMAGE
    labels = [token if draw.random() < 0.6 and token != IMAGE else IGNORED for token in tokens[1:]] + [IGNORED]
    labels[length - 3 :] = [tokens[length - 2], tokens[length - 1], IGNORED]
    generator = torch.Generator().manual_seed(number)
    tiles = torch.randn(sum(r * c for r, c in grids), 3, 28, 28, generator=generator)
    return Example(tokens, labels, tiles, tuple(ImageLayout(r, c) for r, c in grids), f"row {number}", "test")


EXAMPLES = [
    example(0, [(1, 1)], 12), example(1, [], 7), example(2, [(1, 2), (2, 1)], 15), example(3, [(2, 2)], 9),
    example(4, [], 5), example(5, [(1, 1)], 14),
]  # fmt: skip


def cut(batch: BatchConfig) -> list[MicroBatch]:
    return list(micro_batches(EXAMPLES, batch, CONFIG))


def gradients(pieces: list[MicroBatch], recompute: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    model = random_model()
    if recompute:
        recompute_blocks(model)
    total = sum(int((piece.labels != IGNORED).sum()) for piece in pieces)
    loss = 0.0
    for piece in pieces:
        wanted = piece.labels != IGNORED
        hidden = model.hidden(piece.inputs)
        part = summed_loss(model, hidden[wanted], piece.labels[wanted], torch.float32) / total
        part.backward()
        loss += part.item()
    return loss, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def close(a: tuple[float, dict[str, torch.Tensor]], b: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert a[0] == pytest.approx(b[0], abs=1e-5) and a[1].keys() == b[1].keys()
    for name, value in a[1].items():
        torch.testing.assert_close(b[1][name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_packed_rows_equal_each_alone() -> None:
    model = random_model()
    (piece,) = cut(BatchConfig(tokens=100, packing=True))
    assert piece.inputs.tokens.shape == (1, 62) and piece.inputs.lengths == (62,) and sum(piece.lengths) == 62
    logits = model.decoder.lm_head(model.hidden(piece.inputs))[0]
    by_name = {one.where: one for one in EXAMPLES}
    first = 0
    for name, length in zip(piece.rows[0].split(", "), piece.lengths, strict=True):
        alone = model(microbatch([by_name[name]], CONFIG).inputs).logits[0]
        torch.testing.assert_close(logits[first : first + length, : alone.shape[-1]], alone, atol=1e-5, rtol=1e-5)
        assert piece.labels[0, first : first + length].tolist() == by_name[name].labels
        first += length


def test_rows_of_several_segments_read_their_own_only() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]])
    lengths = segment_lengths(segments)
    assert lengths == ((2, 3), (1, 1, 3))
    own = (segments[:, None, :, None] == segments[:, None, None, :]).tril()
    wanted = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert own[0, 0].int().tolist() == wanted
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    found = ops.segment_attention(q, k, v, lengths)
    torch.testing.assert_close(found, ops.attention(q, k, v, mask=own), atol=1e-6, rtol=1e-6)


def test_a_step_does_not_depend_on_how_it_is_cut() -> None:
    whole = gradients(cut(BatchConfig(tokens=1000)))
    assert [len(p.rows) for p in cut(BatchConfig(tokens=1000, rows_at_once=2))] == [2, 2, 2]
    assert [len(p.lengths) for p in cut(BatchConfig(tokens=30, packing=True))] == [2, 3, 1]
    for batch in (
        BatchConfig(rows_at_once=1), BatchConfig(rows_at_once=2), BatchConfig(tokens=40),
        BatchConfig(tokens=100, packing=True), BatchConfig(tokens=30, packing=True),
    ):  # fmt: skip
        close(whole, gradients(cut(batch)))


def test_rows_of_like_length_share_a_batch() -> None:
    pieces = cut(BatchConfig(tokens=28))
    assert [p.lengths for p in pieces] == [(5, 7), (9, 12), (14,), (15,)] or all(
        max(p.lengths) * len(p.lengths) <= 28 for p in pieces
    )
    lengths = [max(p.lengths) for p in pieces]
    assert sorted(n for p in pieces for n in p.lengths) == sorted(len(e.tokens) for e in EXAMPLES)
    assert all(max(p.lengths) * len(p.lengths) <= 28 for p in pieces) and len(lengths) <= 5


def test_pictures_of_different_sizes_lie_in_different_batches() -> None:
    larger = dataclasses.replace(EXAMPLES[0], tiles=torch.zeros(1, 3, 56, 28), where="larger")
    for packing in (False, True):
        pieces = list(micro_batches([*EXAMPLES, larger], BatchConfig(tokens=1000, packing=packing), CONFIG))
        apart = [p for p in pieces if "larger" in ", ".join(p.rows)]
        assert len(apart) == 1 and apart[0].inputs.tiles.shape[2:] == (56, 28)


def test_blocks_that_are_computed_again_give_the_same_gradients() -> None:
    pieces = cut(BatchConfig(tokens=1000))
    close(gradients(pieces), gradients(pieces, recompute=True))


def test_blocks_are_computed_again_in_both_parts() -> None:
    model = recompute_blocks(random_model())
    counts = {"vision": 0, "decoder": 0}

    def count(module: torch.nn.Module, given: object, output: object) -> None:
        counts[next(part for part in counts if module in getattr(model, part).modules())] += 1

    for block in (model.vision.layers[0], model.vision.global_layers[0], *model.decoder.layers[:2]):
        block.attention.register_forward_hook(count)
    (piece,) = cut(BatchConfig(tokens=1000))
    hidden = model.hidden(piece.inputs)
    once = dict(counts)
    hidden.sum().backward()
    assert {part: counts[part] - once[part] for part in counts} == once and min(once.values()) > 0
    with torch.no_grad():
        model.hidden(piece.inputs)
    assert counts == {part: 3 * number for part, number in once.items()}


def test_a_copy_computes_its_own_blocks_again() -> None:
    model = recompute_blocks(random_model())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for block in model.decoder.layers:
            block.mlp.down_proj.weight.fill_(float("nan"))
    (piece,) = cut(BatchConfig(tokens=1000))
    hidden = other.hidden(piece.inputs)
    torch.testing.assert_close(hidden, random_model().hidden(piece.inputs))
    hidden.sum().backward()
    assert other.decoder.layers[0].mlp.down_proj.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())
