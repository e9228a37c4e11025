"""Random workloads: whatever arrives, is cancelled or gives way, each request is answered as `generate` does it alone.

`ENGINE_WORKLOADS=300` runs so many; each number is a workload of its own.
"""

from __future__ import annotations

import contextlib
import os
import random
from dataclasses import dataclass, replace

import pytest
import torch

from llama_multimodal import SamplingParams
from llama_multimodal.engine import DraftModel, Engine, EngineConfig, PromptLookup, Request, Speculation, plan_cache
from llama_multimodal.errors import ConfigError

from .engine_for_tests import ADAPTERS, CONTEXT, IMAGE, alone, check_accounts, check_whole, model, prompt, stranger

WORKLOADS = int(os.environ.get("ENGINE_WORKLOADS", "42"))
KINDS = ("cross_attention", "splice", "text")


@dataclass
class Asked:
    tokens: tuple[int, ...]
    pictures: tuple[int, ...]
    params: SamplingParams
    arrival: int  # step
    cancelled: int | None  # step
    priority: int
    adapter: str | None


def draw(rng: random.Random, kind: str, beginnings: list[list[int]], adapted: bool) -> Asked:
    tokens = rng.choice(beginnings) + [rng.randrange(60) for _ in range(rng.randrange(1, 12))]
    pictures: list[int] = []
    if kind != "text" and rng.random() < 0.6:
        for _ in range(rng.randrange(1, 4)):  # adjacent ones too
            tokens.insert(rng.randrange(1, len(tokens) + 1), IMAGE)
            pictures.append(rng.randrange(3))
    hot = rng.random() < 0.4
    params = SamplingParams(
        max_new_tokens=rng.randrange(1, 20),
        temperature=rng.choice([0.7, 1.5]) if hot else 0.0,
        top_k=rng.choice([0, 5]) if hot else 0,
        top_p=rng.choice([1.0, 0.9]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        stop=rng.choice([(), (), ("ac", "dbb")]),
        seed=rng.randrange(100),
    )
    cancelled = rng.randrange(12) if rng.random() < 0.15 else None
    adapter = rng.choice(["", *ADAPTERS]) if adapted else None
    return Asked(tuple(tokens), tuple(pictures), params, rng.randrange(6), cancelled, rng.choice([0, 0, 0, 1]), adapter)


def speculation(rng: random.Random, kind: str, dtype: torch.dtype) -> Speculation | None:
    """None, look-up, the model itself, or a model that knows nothing of it."""
    which = rng.choice(["none", "lookup", "itself", "stranger"])
    most = rng.choice([1, 2, 5, 20])
    if which == "none":
        return None
    if which == "lookup":
        smallest = rng.choice([1, 2])
        return PromptLookup(most, max_ngram=smallest + rng.randrange(3), min_ngram=smallest)
    return DraftModel(model(kind, dtype) if which == "itself" else stranger(rng.choice([24, CONTEXT])), most)


def settings(rng: random.Random, kind: str, dtype: torch.dtype, asked: list[Asked]) -> EngineConfig:
    """Memory for the largest request and little more, so that requests have to give way."""
    rows = rng.choice([1, 2, 3, 5])
    config = EngineConfig(
        max_requests=rows,
        max_tokens_in_batch=rows + rng.choice([0, 3, 20, 200]),
        max_tiles_in_batch=rng.randrange(1, 9),
        block_size=rng.choice([1, 2, 4, 7]),
        patience=rng.choice([1, 3]),
        prefix_cache=rng.random() < 0.8,
        overlap_images=rng.random() < 0.3,
        image_share=rng.choice([0.2, 0.4]),
        speculation=speculation(rng, kind, dtype),
    )
    lengths = [prompt(kind, one.tokens, one.pictures).lengths[0] + one.params.max_new_tokens - 1 for one in asked]
    tokens = min(CONTEXT - 1, max(lengths))
    units = 0 if kind == "text" else 12 if kind == "cross_attention" else 16  # of three pictures, or of one
    device, memory = torch.device("cpu"), 1 << 14
    while True:
        with contextlib.suppress(ConfigError):
            plan = plan_cache(model(kind).config, replace(config, cache_memory=memory), dtype, device)
            if plan.num_blocks >= -(-tokens // plan.block_size) and plan.num_units >= units:
                return replace(config, cache_memory=int(memory * rng.choice([1, 1, 1, 2])))
        memory = int(memory * 1.02)


def run(number: int) -> Engine:
    rng = random.Random(number)
    kind = KINDS[number % 3]
    dtype = rng.choice([torch.float32, torch.float64])
    beginnings = [[60, *(rng.randrange(60) for _ in range(rng.randrange(14)))] for _ in range(2)]
    adapted = rng.random() < 0.3
    asked = [draw(rng, kind, beginnings, adapted) for _ in range(rng.randrange(3, 11))]
    engine = Engine(model(kind, dtype, adapted), None, settings(rng, kind, dtype, asked))
    jobs = {}
    for step in range(2000):
        for i, one in enumerate(asked):
            if one.arrival == step:
                inputs = prompt(kind, one.tokens, one.pictures)
                jobs[i] = engine.add(
                    Request(inputs=inputs, params=one.params, priority=one.priority, adapter=one.adapter)
                )
            if one.cancelled == step and i in jobs:
                engine.cancel(jobs[i])
        engine.step()
        check_accounts(engine)
        if step >= 12 and not engine.has_work:
            break
    engine.close()
    check_whole(engine)
    assert engine.nbytes == engine.plan.nbytes <= engine.config.cache_memory
    assert len(jobs) == len(asked)
    for i, one in enumerate(asked):
        answer = jobs[i].answer
        assert answer is not None
        if prompt(kind, one.tokens, one.pictures).lengths[0] >= CONTEXT:
            assert answer.finish_reason in ("error", "cancelled")
            continue
        expected = alone(kind, one.tokens, one.pictures, one.params, dtype, one.adapter)
        if answer.finish_reason == "cancelled":
            assert one.cancelled is not None
            assert answer.token_ids == expected.token_ids[0][: len(answer.token_ids)]
            continue
        assert answer.error is None
        assert (answer.token_ids, answer.text, answer.finish_reason) == (
            expected.token_ids[0], expected.texts[0], expected.finish_reasons[0],
        )  # fmt: skip
        streamed = [event for event in jobs[i].events]
        assert [event.token_id for event in streamed] == answer.token_ids
        assert "".join(event.text for event in streamed) == answer.text
    return engine


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(6, WORKLOADS, 6))])
def test_every_request_is_answered_as_alone(first: int) -> None:
    for number in range(first, min(first + 6, WORKLOADS)):
        run(number)


@pytest.mark.slow
def test_the_workloads_are_hard() -> None:
    """Requests do give way, prefixes and pictures are found again, in those very workloads."""
    metrics = [run(number).metrics for number in range(0, 18)]
    assert sum(m.preemptions for m in metrics) > 10
    assert sum(m.cached_tokens for m in metrics) > 50
    assert sum(m._images.hits for m in metrics) > 5
    assert sum(m.accepted_tokens for m in metrics) > 50
    assert sum(m.proposed_tokens - m.accepted_tokens for m in metrics) > 50
