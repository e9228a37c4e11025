"""Sharded training against one process that has all the data."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from ranks import Group
from runs import CONFIGS, assert_same_run, loss_of, make_batch, make_model, train
from torch import Tensor, nn

from llama_multimodal.distributed import (
    ParallelConfig,
    alike,
    clip_gradients,
    full_state,
    make_mesh,
    match_images,
    parallelize,
    reader,
    shard_model,
    sync_gradients,
)
from llama_multimodal.distributed.fsdp import IGNORED
from llama_multimodal.errors import ConfigError
from llama_multimodal.inputs import ModelInputs
from llama_multimodal.models import LanguageModel


def sharded(name: str, *sizes: int, prepare: Any = None, foreach: bool = False) -> Any:
    mesh = make_mesh(ParallelConfig(*sizes), "cpu")
    return train(name, mesh, foreach=foreach, **({"prepare": prepare} if prepare else {}))


@pytest.mark.parametrize("name", CONFIGS)
def test_shards_learn_what_one_process_learns(name: str, two: Group) -> None:
    """With micro-batches, and pictures that one reader has and the other has not."""
    (got, rest) = two(sharded, name, 1, 2)
    assert_same_run(got, train(name))
    assert rest[:2] == got[:2] and rest[2] == {}  # both know loss and norm, the first one has the state


def test_copies_learn_what_one_process_learns(two: Group) -> None:
    assert_same_run(two(sharded, "llama vision", 2, 1)[0], train("llama vision"))


def test_shards_of_parts_learn_what_one_process_learns(four: Group) -> None:
    """Two shards of two tensor parts, with an optimizer that takes many tensors at once."""
    assert_same_run(four(in_both_ways, "llama vision")[0], train("llama vision"))


def in_both_ways(name: str) -> Any:
    return sharded(name, 1, 2, 2, foreach=True)


# --- frozen parameters ------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A frozen layer, and a product of two small matrices beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(3)
        a, b = (torch.randn(2, size, generator=generator).double() for size in (base.in_features, base.out_features))
        self.a, self.b = nn.Parameter(0.1 * a), nn.Parameter(0.1 * b)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b


def only_adapters(model: LanguageModel) -> None:
    model.requires_grad_(False)
    for layer in model.decoder.layers:
        layer.attention.o_proj = Adapter(layer.attention.o_proj)


def some_of_each_unit(model: LanguageModel) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name or "norm" in name or "gate" in name)


def only_the_head(model: LanguageModel) -> None:
    model.requires_grad_(False)
    model.decoder.lm_head.requires_grad_(True)


def only_keys_and_values(model: LanguageModel) -> None:
    """What is used before its block runs, of features that need no gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attention.kv" in name)


def part_of_it(prepare: Any) -> Any:
    mesh = make_mesh(ParallelConfig(), "cpu")
    run = train("llama vision", mesh, prepare=prepare)
    model = make_model("llama vision")
    prepare(model)
    shard_model(model, mesh)
    return run, sorted(full_state(model, trainable_only=True))


@pytest.mark.parametrize("prepare", [only_adapters, some_of_each_unit, only_the_head, only_keys_and_values])
def test_frozen_parameters_stay(prepare: Any, two: Group) -> None:
    got, learnt = two(part_of_it, prepare)[0]
    model = make_model("llama vision")
    prepare(model)
    wanted = train("llama vision", prepare=prepare)
    assert_same_run(got, wanted)
    assert learnt == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    for name, parameter in model.named_parameters():
        assert torch.equal(got[2][name], parameter) != parameter.requires_grad, name


# --- a step -----------------------------------------------------------------------------------------------------------


def accumulated() -> list[int]:
    """How many gradients there are after a pass without exchange, and after one with it."""
    mesh = make_mesh(ParallelConfig(), "cpu")
    model = shard_model(make_model("llama"), mesh)
    found = []
    for now in (False, True):
        sync_gradients(model, now)
        loss_of(model, *make_batch("llama", reader(mesh), [0, 0])).backward()
        found.append(sum(parameter.grad is not None for parameter in model.parameters()))
    return found


def test_gradients_are_exchanged_once(two: Group) -> None:
    assert two(accumulated) == [[0, len(list(make_model("llama").parameters()))]] * 2


def clipped(limit: float) -> tuple[float, float]:
    mesh = make_mesh(ParallelConfig(shard=1, tensor=2), "cpu")
    model = parallelize(make_model("llama"), mesh)
    loss_of(model, *make_batch("llama", 0, [0])).backward()
    parameters = list(model.parameters())
    assert len(alike(parameters)) == 2 and sum(map(len, alike(parameters))) == len(parameters)
    return float(clip_gradients(parameters, limit, mesh)), float(clip_gradients(parameters, limit, mesh))


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_the_norm_is_that_of_the_whole(limit: float, two: Group) -> None:
    model = make_model("llama")
    loss_of(model, *make_batch("llama", 0, [0])).backward()
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), limit))
    for before, after in two(clipped, limit):
        assert before == pytest.approx(norm, rel=1e-9) and after == pytest.approx(min(norm, limit), rel=1e-5)


def in_half(name: str) -> list[Any]:
    """Logits and a gradient in bf16, of a sharded model in fp32."""
    mesh = make_mesh(ParallelConfig(), "cpu")
    model = shard_model(make_model(name).float(), mesh, precision=torch.bfloat16)
    inputs, labels = make_batch(name, 0, [1, 2])
    images = model.read_images(inputs)  # as `generate` does, outside of the model's forward pass
    logits = model(inputs, images=images).logits
    loss_of(model, inputs, labels).backward()
    return [logits, {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None}]


@pytest.mark.parametrize("name", ["llama vision", "siglip"])
def test_half_precision_computes_as_a_half_model(name: str, two: Group) -> None:
    """Bit for bit: angles and the biases of attention stay in fp32 under FSDP too."""
    inputs, _ = make_batch(name, 0, [1, 2])
    wanted = make_model(name).bfloat16()(inputs).logits
    for logits, dtypes in two(in_half, name):
        assert logits.dtype == torch.bfloat16 and torch.equal(logits, wanted)
        assert dtypes == {torch.float32}


# --- pictures ---------------------------------------------------------------------------------------------------------


def matched(name: str) -> Any:
    mesh = make_mesh(ParallelConfig(), "cpu")
    batch = make_batch(name, 5, [[2, 1], [0, 0]][reader(mesh)])
    return match_images(*batch, CONFIGS[name], mesh)


@pytest.mark.parametrize("name", ["llama vision", "siglip", "llava-next", "dinov2"])
def test_a_blank_picture_teaches_nothing(name: str, two: Group) -> None:
    first, second = two(matched, name)
    assert torch.equal(first[0].tiles, make_batch(name, 5, [2, 1])[0].tiles)
    inputs, labels = make_batch(name, 5, [0, 0])
    rows, width = inputs.tokens.shape
    added = 2 if name == "llama vision" else 1  # a picture of one tile and one of two
    assert second[0].num_rows == rows + added == len(second[0].lengths) and len(second[0].images) == added
    assert torch.equal(second[0].tokens[:rows, :width], inputs.tokens)
    assert torch.equal(second[1][:rows, :width], labels) and (second[1][rows:] == IGNORED).all()
    model = make_model(name)
    plain = loss_of(model, inputs, labels)
    plain.backward()
    wanted = {key: copy.copy(parameter.grad) for key, parameter in model.named_parameters()}
    model.zero_grad()
    loss = loss_of(model, *second)
    loss.backward()
    torch.testing.assert_close(loss, plain)
    for key, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if wanted[key] is None else wanted[key]
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradient, msg=key)
    assert sum(p.grad is not None for p in model.parameters()) > sum(g is not None for g in wanted.values())


def matched_in_segments() -> Any:
    mesh = make_mesh(ParallelConfig(), "cpu")
    inputs, labels = make_batch("siglip", 5, [[1], [0, 0]][reader(mesh)])
    return match_images(in_threes(inputs), labels, CONFIGS["siglip"], mesh)


def in_threes(inputs: ModelInputs) -> ModelInputs:
    """As packed rows are: segments of three tokens, each of which counts its positions from 0."""
    place = torch.arange(inputs.tokens.shape[1])
    segments, positions = ((x.expand_as(inputs.tokens)).clone() for x in (place // 3, place % 3))
    return dataclasses.replace(inputs, segments=segments, positions=positions)


def test_rows_of_several_segments_get_a_blank_picture(two: Group) -> None:
    inputs, _ = two(matched_in_segments)[1]
    plain, _ = make_batch("siglip", 5, [0, 0])
    plain = in_threes(plain)
    assert torch.equal(inputs.positions[: plain.num_rows, : plain.tokens.shape[1]], plain.positions)
    assert inputs.segments.shape == inputs.tokens.shape and inputs.num_rows > plain.num_rows
    model = make_model("siglip")
    wanted = model.hidden(plain)
    got = model.hidden(inputs)[: plain.num_rows, : plain.tokens.shape[1]]
    torch.testing.assert_close(got, wanted)


def sharded_twice() -> None:
    mesh = make_mesh(ParallelConfig(), "cpu")
    model = shard_model(make_model("llama"), mesh)
    with pytest.raises(ConfigError, match="sharded already"):
        shard_model(model, mesh)
    with pytest.raises(ConfigError, match="parallelize it first"):
        parallelize(model, mesh)


def test_a_model_is_sharded_once(two: Group) -> None:
    two(sharded_twice)
