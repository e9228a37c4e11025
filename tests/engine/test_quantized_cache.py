"""The engine's cache in 8 bits: bytes, the logits' error, and answers that do not depend on what else is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llama_multimodal import SamplingParams, ops
from llama_multimodal.config import LLAMA_3_2_11B_VISION
from llama_multimodal.engine import Engine, EngineConfig, Request, plan_cache
from llama_multimodal.errors import ConfigError
from llama_multimodal.ops import QuantizedBlocks

from .engine_for_tests import IMAGE, check_whole, model, prompt

SMALL = EngineConfig(block_size=4, cache_memory="2MiB")
ASKED: list[tuple[list[int], list[int]]] = [
    ([60, 5, 9, 11, 3, 21, 30, 8, 7, 12, 40], []),
    ([60, IMAGE, 5, 9, 11, 3], [2]),
    ([60, 5, 9, 11, 3, 21, IMAGE, 30, IMAGE, 4], [1, 0]),
    ([60, 5, 9, 11, 3, 21, 7], []),
    ([60, IMAGE, IMAGE, 8, 7], [3, 2]),
    ([60, 5], []),
    ([60, 9, 2], []),
    ([60, 2], []),
]

each_format = pytest.mark.parametrize("format", ["int8", "fp8"])
each_kind = pytest.mark.parametrize("kind", ["cross_attention", "splice", "text"])


def asked_of(kind: str) -> list[tuple[list[int], list[int]]]:
    return [one for one in ASKED if kind != "text" or not one[1]]


def logits(kind: str, config: EngineConfig, tokens: list[int], pictures: list[int]) -> Tensor:
    """Of a prompt's last token, read in chunks and its end one by one: through both kinds of attention."""
    engine = Engine(model(kind), None, config)
    found = []
    forward = engine.runner.forward
    engine.runner.forward = lambda segments: found.append(forward(segments)) or found[-1]  # type: ignore
    engine.generate([Request(inputs=prompt(kind, tokens, pictures), params=SamplingParams(max_new_tokens=1))])
    (last,) = found[-1].values()
    return last


@each_format
@each_kind
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_error_of_the_logits(format: str, kind: str, backend: str) -> None:
    """Relative to the logits, root mean square; a random model's are as bad as they come."""
    if backend != "torch" and ops._dispatch.why_missing(backend):
        pytest.skip("no such kernels here")
    chunks = replace(SMALL, max_tokens_in_batch=3, max_requests=1)
    with ops.use_backend(backend):
        for tokens, pictures in asked_of(kind):
            plain = logits(kind, chunks, tokens, pictures)
            error = logits(kind, replace(chunks, cache_dtype=format), tokens, pictures) - plain
            relative = float(error.norm() / plain.norm())
            assert 1e-5 < relative < (0.03 if format == "int8" else 0.12)


@each_format
@each_kind
def test_answers_do_not_depend_on_company(format: str, kind: str) -> None:
    """Batches, chunks, preemption and prefixes that are found again change nothing."""
    params = SamplingParams(max_new_tokens=12)
    requests = [Request(inputs=prompt(kind, *one), params=params) for one in asked_of(kind)]
    config = replace(SMALL, cache_dtype=format)
    alone = [Engine(model(kind), None, config).generate([request])[0].token_ids for request in requests]
    plan = Engine(model(kind), None, config).plan
    pictures = plan.num_units * plan.unit_bytes
    memory = 10 * plan.block_bytes + pictures
    limits = {"max_tokens_in_batch": 5, "max_requests": 4, "cache_memory": memory, "image_share": pictures / memory}
    tight = replace(config, **limits)  # type: ignore[arg-type]
    engine = Engine(model(kind), None, tight)
    for _ in range(2):
        answers = engine.generate(requests)
        assert [answer.token_ids for answer in answers] == alone
        check_whole(engine)
    assert engine.metrics.preemptions and engine.metrics.cached_tokens


@each_format
@each_kind
def test_bytes_are_real(format: str, kind: str) -> None:
    engine, plain = (Engine(model(kind), None, replace(SMALL, cache_dtype=name)) for name in (format, None))
    runner = engine.runner
    pools = [*runner.keys, *runner.values, *runner.image_keys, *runner.image_values]
    parts = [part for pool in pools if isinstance(pool, QuantizedBlocks) for part in (pool.values, pool.scales)]
    parts += [] if runner.embeddings is None else [runner.embeddings]
    assert len(parts) >= 2 * len(pools)
    assert sum(part.untyped_storage().nbytes() for part in parts) == engine.plan.nbytes == runner.nbytes <= 2 << 20
    dim = model(kind).config.text.head_dim
    assert engine.plan.block_bytes / plain.plan.block_bytes == (dim + 4) / (4 * dim)  # the models are fp32
    assert engine.plan.num_blocks > 1.5 * plain.plan.num_blocks


def test_a_plan_of_the_released_model() -> None:
    config = EngineConfig(cache_memory="8GiB")
    plain, small = (
        plan_cache(LLAMA_3_2_11B_VISION, replace(config, cache_dtype=name), torch.bfloat16, torch.device("cpu"))
        for name in (None, "int8")
    )
    assert small.block_bytes / plain.block_bytes == small.unit_bytes / plain.unit_bytes == 132 / 256
    assert small.num_blocks / plain.num_blocks == pytest.approx(256 / 132, rel=0.01)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match='cache_dtype must be "int8" or "fp8", or left out, not \'int4\''):
        EngineConfig(cache_dtype="int4")
