"""What is computed once: prefixes, pictures; what fits, and what does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llama_multimodal import SamplingParams, generate, ops
from llama_multimodal.config import LLAMA_3_2_11B_VISION
from llama_multimodal.engine import Engine, EngineConfig, Request, plan_cache
from llama_multimodal.engine.config import parse_bytes
from llama_multimodal.engine.request import Job
from llama_multimodal.errors import ConfigError

from .engine_for_tests import CONFIGS, IMAGE, alone, check_whole, model, prompt

GREEDY = SamplingParams(max_new_tokens=6)
SMALL = EngineConfig(block_size=4, cache_memory="2MiB")
BEGINNING = [60, 5, 9, 11, 3, 21, 30, 8, 7]  # two blocks and a token


def ask(engine: Engine, kind: str, *asked: tuple[list[int], list[int]], params: SamplingParams = GREEDY) -> list[int]:
    """Answers as alone; tokens of each prompt that were not computed again."""
    requests = [Request(inputs=prompt(kind, tokens, pictures), params=params) for tokens, pictures in asked]
    answers = engine.generate(requests)
    for answer, (tokens, pictures) in zip(answers, asked):
        expected = alone(kind, tuple(tokens), tuple(pictures), params, engine.model.dtype)
        assert answer.error is None and answer.token_ids == expected.token_ids[0]
    check_whole(engine)
    return [answer.metrics.cached_tokens for answer in answers]


# --- prefixes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cross_attention", "splice", "text"])
def test_an_equal_beginning_is_computed_once(kind: str) -> None:
    engine = Engine(model(kind), None, SMALL)
    assert ask(engine, kind, (BEGINNING, [])) == [0]
    before = engine.metrics.computed_tokens
    asked = [*BEGINNING, 1, 2]
    assert ask(engine, kind, (asked, [])) == [8]
    answer = alone(kind, tuple(asked), (), GREEDY, torch.float32).token_ids[0]
    assert engine.metrics.computed_tokens - before == 3 + len(answer) - 1  # nobody reads what the last token says
    assert engine.metrics.as_dict()["prefix_hit_rate"] == 8 / 20
    assert ask(engine, kind, (BEGINNING[:8], [])) == [4]  # the last token is computed: its logits are needed
    assert ask(engine, kind, ([9, *BEGINNING[1:]], [])) == [0]


@pytest.mark.parametrize("kind", ["cross_attention", "splice"])
def test_the_text_before_a_picture_is_shared_and_what_sees_it_is_not(kind: str) -> None:
    engine = Engine(model(kind), None, SMALL)
    asked = [*BEGINNING, IMAGE, 4, 12, 13, 14, 15, 16, 17, 18]
    ask(engine, kind, (asked, [0]))
    assert ask(engine, kind, (asked, [4])) == [8]  # cut alike, other pixels
    [again] = ask(engine, kind, (asked, [4]))
    assert again == (len(prompt(kind, asked, [4]).tokens[0]) - 1) // 4 * 4
    assert ask(engine, kind, ([*BEGINNING, 4, 12, 13, 14, 15], [])) == [8]


def test_a_picture_later_in_the_same_block_is_told_apart() -> None:
    """Blocks longer than the text: the tokens are equal, and only the picture is not."""
    engine = Engine(model("cross_attention"), None, replace(SMALL, block_size=8))
    for pictures in ([0], [4], [0], [4]):
        ask(engine, "cross_attention", ([60, 1, 2, IMAGE, 3, 4, 5, 6, 7, 8], pictures))


def test_keys_name_adapters() -> None:
    jobs = [Job(0, Request(), 0, 1) for _ in range(4)]
    for job, adapter in zip(jobs, ["", "a", "b", "a"]):
        job.prepare(prompt("cross_attention", [60, IMAGE, 3, 4, 5], [0]), (), 64, adapter=adapter)
    names = [job.block_keys(1, 4)[0] for job in jobs]
    assert len(set(names)) == 3 and names[1] == names[3]
    assert len({job.images[0].key for job in jobs}) == 3


def test_what_was_answered_is_part_of_the_next_turns_prefix() -> None:
    engine = Engine(model("text"), None, SMALL)
    expected = alone("text", tuple(BEGINNING), (), GREEDY, torch.float32).token_ids[0]
    ask(engine, "text", (BEGINNING, []))
    assert ask(engine, "text", ([*BEGINNING, *expected, 1], [])) == [12]  # 14 of 15 tokens are in the cache


def test_nothing_is_shared_without_the_prefix_cache() -> None:
    engine = Engine(model("text"), None, replace(SMALL, prefix_cache=False))
    assert ask(engine, "text", (BEGINNING, [])) == ask(engine, "text", (BEGINNING, [])) == [0]


def test_clear_cache_forgets() -> None:
    engine = Engine(model("cross_attention"), None, SMALL)
    asked = ([*BEGINNING, IMAGE, 4], [0])
    assert ask(engine, "cross_attention", asked) == [0]
    assert ask(engine, "cross_attention", asked) == [8] and engine.metrics.encoded_images == 1
    engine.clear_cache()
    assert ask(engine, "cross_attention", asked) == [0] and engine.metrics.encoded_images == 2


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cross_attention", "splice"])
def test_a_picture_is_encoded_once_over_eight_turns(kind: str) -> None:
    engine = Engine(model(kind), None, SMALL)
    tokens = [60, 5, IMAGE, 3]
    for turn in range(8):
        ask(engine, kind, (tokens, [1]))
        answer = alone(kind, tuple(tokens), (1,), GREEDY, torch.float32).token_ids[0]
        tokens = [*tokens, *answer[:3], 2 + turn]
    assert engine.metrics.encoded_images == 1
    assert engine.metrics.cached_tokens > 50


@pytest.mark.parametrize("overlap", [False, True])
def test_requests_share_a_picture_in_one_batch(overlap: bool) -> None:
    engine = Engine(model("cross_attention"), None, replace(SMALL, overlap_images=overlap))
    ask(engine, "cross_attention", *(([60, IMAGE, i], [2]) for i in range(5)), ([60, IMAGE, IMAGE, 3], [2, 2]))
    assert engine.metrics.encoded_images == 1
    engine.close()


def test_pictures_of_several_requests_are_encoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model("cross_attention"), None, SMALL)
    calls: list[int] = []
    encode = engine.runner.encode
    monkeypatch.setattr(engine.runner, "encode", lambda uses: (calls.append(len(uses)), encode(uses))[1])
    ask(engine, "cross_attention", *(([60, IMAGE, 3], [i]) for i in range(6)))  # 1, 2, 4, 2, 1, 2 tiles
    assert calls == [6]
    engine = Engine(model("cross_attention"), None, replace(SMALL, max_tiles_in_batch=4))
    calls.clear()
    encode = engine.runner.encode
    monkeypatch.setattr(engine.runner, "encode", lambda uses: (calls.append(len(uses)), encode(uses))[1])
    ask(engine, "cross_attention", *(([60, IMAGE, 3], [i]) for i in range(6)))
    assert sum(calls) == 6 and len(calls) >= 3


def test_pictures_that_are_not_looked_at_any_more_are_let_go_of() -> None:
    """Seven units of pictures in all, at most four at a time: a pool of four is enough."""
    config = EngineConfig(block_size=4, cache_memory=40_000, image_share=0.05)
    engine = Engine(model("cross_attention"), None, config)
    assert engine.images.num_units == 4
    ask(engine, "cross_attention", ([60, IMAGE, 3, IMAGE, 4, IMAGE, 5], [0, 1, 2]))
    assert engine.metrics.peak_image_units == 4


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cross_attention", "splice", "text"])
@pytest.mark.parametrize("memory", [60_000, 2**20, "1.5MiB"])
@pytest.mark.parametrize("share", [None, 0.5])
def test_the_cache_takes_what_it_may_and_no_more(kind: str, memory: int | str, share: float | None) -> None:
    engine = Engine(model(kind), None, EngineConfig(cache_memory=memory, image_share=share))
    tensors = [*engine.runner.keys, *engine.runner.values, *engine.runner.image_keys, *engine.runner.image_values]
    tensors += [] if engine.runner.embeddings is None else [engine.runner.embeddings]
    taken, allowed = sum(t.untyped_storage().nbytes() for t in tensors), parse_bytes(memory)
    assert taken == engine.plan.nbytes == engine.runner.nbytes
    assert allowed - engine.plan.block_bytes - engine.plan.unit_bytes < taken <= allowed


def test_a_plan_of_the_released_model() -> None:
    plan = plan_cache(LLAMA_3_2_11B_VISION, EngineConfig(cache_memory="8GiB"), torch.bfloat16, torch.device("cpu"))
    assert plan.block_bytes == 16 * 128 * 1024  # 128 KiB a token
    assert plan.unit_tokens == 1601 and plan.unit_bytes == 1601 * 32 * 1024  # 32 KiB a vision token
    assert plan.nbytes <= 8 * 2**30 < plan.nbytes + plan.block_bytes + plan.unit_bytes
    whole = 4 * plan.unit_bytes / (1024 * 128 * 1024)
    assert plan.num_units * plan.unit_bytes / (plan.num_blocks * plan.block_bytes) == pytest.approx(whole, rel=0.05)


def test_without_a_limit_the_whole_context_fits() -> None:
    plan = plan_cache(CONFIGS["cross_attention"], EngineConfig(max_requests=3), torch.float32, torch.device("cpu"))
    assert plan.num_blocks * 16 == 3 * 64 and plan.num_units == 3 * 8 * 4


@pytest.mark.parametrize(
    "text, size", [("4GiB", 4 * 2**30), ("512 MB", 512 * 10**6), ("1.5kib", 1536), (77, 77), ("99", 99)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cache_memory": "4 gigs"}, 'such as "4GiB"'),
        ({"cache_memory": 0}, 'such as "4GiB"'),
        ({"max_requests": 0}, "max_requests must be at least 1"),
        ({"max_requests": 9, "max_tokens_in_batch": 8}, "at least max_requests"),
        ({"image_share": 1.0}, "image_share"),
    ],
)
def test_settings_out_of_range(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**change)


def test_too_little_memory_says_how_much_is_needed() -> None:
    with pytest.raises(ConfigError, match="give at least") as caught:
        Engine(model("cross_attention"), None, EngineConfig(cache_memory=1000))
    enough = int(str(caught.value).rsplit(maxsplit=1)[1])
    assert Engine(model("cross_attention"), None, EngineConfig(cache_memory=enough)).plan.num_blocks == 1


# --- long prompts ----------------------------------------------------------------------------------------------------


def test_a_long_prompt_makes_no_mask_of_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 tokens in chunks: no mask has more than the elements that are allowed at once, and it answers as alone."""
    long = model("long")
    tokens = torch.randint(0, 60, (20_000,), generator=torch.Generator().manual_seed(0)).tolist()
    largest = 0
    attention = ops.paged_attention.__globals__["attention"]

    def watched(q, k, v, *, causal=False, mask=None):
        nonlocal largest
        largest = max(largest, 0 if mask is None else mask.numel())
        return attention(q, k, v, causal=causal, mask=mask)

    monkeypatch.setitem(ops.paged_attention.__globals__, "attention", watched)
    params = SamplingParams(max_new_tokens=3)
    engine = Engine(long, None, EngineConfig(max_tokens_in_batch=2048, max_requests=1))
    inputs = prompt("long", tokens)
    [answer] = engine.generate([Request(inputs=inputs, params=params)])
    assert engine.metrics.steps == 10 + 2
    assert 0 < largest <= 1 << 23
    assert answer.token_ids == generate(long, inputs, params).token_ids[0]
