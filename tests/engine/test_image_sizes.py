"""Pictures of several sizes in one engine, for text that looks at them: an encoder that takes any."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from small_model import CONFIG

from llama_multimodal import SamplingParams, generate
from llama_multimodal.config import ClipVisionConfig, LinearProjector, ModelConfig
from llama_multimodal.engine import Engine, EngineConfig, Request
from llama_multimodal.errors import ImageError
from llama_multimodal.inputs import ImageLayout, ModelInputs, batch_inputs, join_tiles
from llama_multimodal.models import LanguageModel, build_model

from .engine_for_tests import IMAGE, check_whole

VISION = ClipVisionConfig(
    hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)
SIZES = [(28, 28), (14, 28), (42, 28), (56, 56), (14, 14), (28, 42)]  # 5, 3, 7, 17, 2 and 7 tokens; a unit has 5
GREEDY = SamplingParams(max_new_tokens=6)
SMALL = EngineConfig(block_size=4, cache_memory="2MiB")


@functools.cache
def any_size() -> LanguageModel:
    config = ModelConfig(VISION, CONFIG.text, IMAGE, LinearProjector(), model_type="llama_multimodal")
    torch.manual_seed(0)
    model = build_model(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" not in name and "gate" not in name:
                value.copy_(2 * value.shape[-1] ** -0.5 * torch.randn(value.shape))
            elif name.endswith("gate"):
                value.fill_(1.0)
    return model


@functools.cache
def picture(number: int) -> torch.Tensor:
    return torch.randn(1, 3, *SIZES[number % len(SIZES)], generator=torch.Generator().manual_seed(number))


def prompt(tokens: Sequence[int], pictures: Sequence[int]) -> ModelInputs:
    tiles, layouts = join_tiles([(picture(number), [ImageLayout(1, 1)]) for number in pictures])
    return batch_inputs([list(tokens)], tiles, layouts, image_token_id=IMAGE, pad_token_id=63)


ASKED: list[tuple[list[int], list[int]]] = [
    *(([60, IMAGE, 5, 9], [number]) for number in range(6)),
    ([60, IMAGE, IMAGE, 5], [1, 0]),  # a gap between them
    ([60, IMAGE, IMAGE, IMAGE, 5, 3], [4, 3, 1]),
    ([60, 2, IMAGE, 7, 8, IMAGE, IMAGE, 5, 3, 4], [2, 0, 5]),
    ([60, 2, 3], []),
]


@pytest.mark.parametrize("tokens", [4096, 4])
@pytest.mark.parametrize("format", [None, "int8"])
def test_each_answers_as_alone(tokens: int, format: str | None) -> None:
    """tokens: of a step, so that a prompt ends in one token of its own, or not"""
    config = replace(SMALL, max_tokens_in_batch=tokens, max_requests=min(tokens, 32), cache_dtype=format)
    requests = [Request(inputs=prompt(*one), params=GREEDY) for one in ASKED]
    if format is None:
        wanted = [generate(any_size(), prompt(*one), GREEDY).token_ids[0] for one in ASKED]
    else:
        wanted = [Engine(any_size(), None, config).generate([request])[0].token_ids for request in requests]
    engine = Engine(any_size(), None, config)
    assert engine.plan.unit_tokens == 5
    answers = engine.generate(requests)
    assert [answer.error for answer in answers] == [None] * len(ASKED)
    assert [answer.token_ids for answer in answers] == wanted
    check_whole(engine)
    assert engine.metrics.encoded_images == 6  # beside a larger one a picture is the same picture


def test_pictures_are_looked_at() -> None:
    """Other pixels, other answers: the tests above compare no two blind answers."""
    answers = {tuple(generate(any_size(), prompt([60, IMAGE, 5, 9], [n]), GREEDY).token_ids[0]) for n in range(12)}
    assert len(answers) > 3


def test_a_size_that_the_encoder_does_not_take_ends_one_request() -> None:
    odd = batch_inputs(
        [[60, IMAGE, 5]], torch.randn(1, 3, 30, 28), [ImageLayout(1, 1)], image_token_id=IMAGE, pad_token_id=63
    )
    engine = Engine(any_size(), None, SMALL)
    bad, good = engine.generate([Request(inputs=odd, params=GREEDY), Request(inputs=prompt(*ASKED[1]), params=GREEDY)])
    assert isinstance(bad.error, ImageError) and "30×28 pixels does not divide into patches of 14" in str(bad.error)
    assert good.token_ids == generate(any_size(), prompt(*ASKED[1]), GREEDY).token_ids[0]
    check_whole(engine)
