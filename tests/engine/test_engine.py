"""What an engine does with requests that fail, are cancelled or wait; its events and its figures."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_model import Letters, random_model

from llama_multimodal import SamplingParams, generate
from llama_multimodal.engine import Answer, Engine, EngineConfig, Request
from llama_multimodal.errors import ConfigError, ImageError, PromptError
from llama_multimodal.inputs import ModelInputs
from llama_multimodal.ops import Format
from llama_multimodal.quant.pack import pack

from .engine_for_tests import CONFIGS, IMAGE, TABLE, alone, check_whole, model, prompt

GREEDY = SamplingParams(max_new_tokens=6)
SMALL = EngineConfig(block_size=4, cache_memory="1MiB")
KIND = "cross_attention"
GOOD = [([60, 5, IMAGE, 3], [1]), ([60, 7, 8], []), ([60, 9, IMAGE, IMAGE, 30], [0, 2])]


def request(tokens: list[int], pictures: list[int] = [], params: SamplingParams = GREEDY, **more: Any) -> Request:  # noqa: B006
    return Request(inputs=prompt(KIND, tokens, pictures), params=params, **more)


def good() -> list[Request]:
    return [request(*one) for one in GOOD]


def untouched(answers: list[Answer]) -> None:
    """The good requests are answered as alone."""
    for answer, (tokens, pictures) in zip(answers, GOOD, strict=True):
        expected = alone(KIND, tuple(tokens), tuple(pictures), GREEDY, torch.float32)
        assert answer.error is None and answer.token_ids == expected.token_ids[0]


def with_bad(engine: Engine, bad: Request) -> Answer:
    """A bad request's answer, asked for among good ones."""
    first, *others = good()
    answers = engine.generate([first, bad, *others])
    untouched([answers[0], *answers[2:]])
    check_whole(engine)
    assert answers[1].finish_reason == "error" and answers[1].error is not None
    return answers[1]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad, message",
    [
        (Request(), "neither messages nor inputs"),
        (Request(messages=[{"role": "user", "content": "Hello"}]), "no processor"),
        (request([60] * 64), "must leave room for an answer in the context of 64"),
        (request([60, 5], adapter="french"), 'no adapter "french"'),
        (request([60], params=replace(GREEDY, seed=2**70)), ""),  # no generator has such a seed
    ],
)
def test_a_request_that_cannot_be_answered_ends_alone(bad: Request, message: str) -> None:
    answer = with_bad(Engine(model(KIND), None, SMALL), bad)
    assert message in str(answer.error) and answer.token_ids == []


def test_a_request_that_never_fits_says_so() -> None:
    engine = Engine(model(KIND), None, replace(SMALL, cache_memory=30_000, image_share=0.35))
    answer = with_bad(engine, request([60] * 60, params=replace(GREEDY, max_new_tokens=50)))
    assert isinstance(answer.error, PromptError) and "never fit in the cache" in str(answer.error)
    answer = with_bad(engine, request([60, IMAGE, IMAGE, IMAGE, 1], [2, 6, 10]))
    assert isinstance(answer.error, PromptError) and "images of 12 units" in str(answer.error)


def test_a_picture_that_cannot_be_read_ends_its_request_alone() -> None:
    def processor(messages: Any) -> ModelInputs:
        if messages == "damaged":
            raise ImageError("the image data is damaged")
        return prompt(KIND, [60, 5])

    engine = Engine(model(KIND), processor, SMALL)
    answer = with_bad(engine, Request(messages="damaged"))
    assert isinstance(answer.error, ImageError)
    [answer] = engine.generate([Request(messages="fine", params=GREEDY)])
    assert answer.error is None


@pytest.mark.parametrize("overlap", [False, True])
def test_a_picture_that_cannot_be_encoded_ends_its_request_alone(
    overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model(KIND), None, replace(SMALL, overlap_images=overlap))
    bad = request([60, 5, IMAGE, 3], [3])
    [poisoned] = bad.inputs.tiles[:1].sum(dim=(1, 2, 3)).tolist()  # type: ignore[union-attr]
    encode = engine.model.encode_images  # type: ignore[operator]

    def failing(inputs: ModelInputs) -> torch.Tensor:
        if any(abs(float(tile.sum()) - poisoned) < 1e-6 for tile in inputs.tiles):
            raise MemoryError("no room for this one")
        return encode(inputs)

    monkeypatch.setattr(engine.model, "encode_images", failing)
    for _ in range(2):  # it is tried again the next time
        assert isinstance(with_bad(engine, bad).error, MemoryError)
    engine.close()


def test_a_step_that_fails_for_one_request_goes_on_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model(KIND), None, SMALL)
    bad = request([60, 11, 12])
    forward = engine.runner.forward

    def failing(segments: Any) -> Any:
        if any(job.request is bad and len(job.tokens) == 5 for job, _, _ in segments):
            raise RuntimeError("a kernel has stumbled")
        return forward(segments)

    monkeypatch.setattr(engine.runner, "forward", failing)
    answer = with_bad(engine, bad)
    assert str(answer.error) == "a kernel has stumbled"
    assert answer.token_ids == alone(KIND, (60, 11, 12), (), GREEDY, torch.float32).token_ids[0][:2]


def test_text_that_cannot_be_decoded_ends_its_request_alone() -> None:
    class Broken(Letters):
        def push(self, token: int) -> str:
            raise ValueError("no such token")

    bad = request([60, 11, 12])
    bad = replace(bad, inputs=replace(bad.inputs, decoder=lambda: Broken(TABLE)))  # type: ignore[type-var]
    assert str(with_bad(Engine(model(KIND), None, SMALL), bad).error) == "no such token"


def test_stop_strings_need_a_decoder() -> None:
    bad = request([60, 11], params=replace(GREEDY, stop=("x",)))
    bad = replace(bad, inputs=replace(bad.inputs, decoder=None))  # type: ignore[type-var]
    assert "stop strings need a tokenizer" in str(with_bad(Engine(model(KIND), None, SMALL), bad).error)


def test_several_rows_are_several_requests() -> None:
    inputs = prompt(KIND, [60, 5])
    doubled = replace(inputs, tokens=inputs.tokens.expand(2, -1), lengths=(2, 2))
    assert "2 rows" in str(with_bad(Engine(model(KIND), None, SMALL), Request(inputs=doubled)).error)


# --- order -----------------------------------------------------------------------------------------------------------


def finishing_order(config: EngineConfig, priorities: list[int]) -> list[int]:
    engine = Engine(model("text"), None, config)
    requests = [
        Request(
            inputs=prompt("text", [60, 1 + i]),
            params=SamplingParams(max_new_tokens=3, temperature=1, seed=i),
            priority=p,
        )
        for i, p in enumerate(priorities)
    ]
    return [event.index for event in engine.stream(requests) if event.finish_reason]


def test_first_come_first_served() -> None:
    one = replace(SMALL, max_requests=1)
    assert finishing_order(one, [0] * 6) == [0, 1, 2, 3, 4, 5]


def test_priority_moves_a_request_forward_a_bounded_number_of_places() -> None:
    one = replace(SMALL, max_requests=1, patience=3)
    assert finishing_order(one, [0, 0, 0, 0, 0, 1]) == [0, 1, 2, 5, 3, 4]
    assert finishing_order(one, [0, 0, 0, 0, 0, 9]) == [5, 0, 1, 2, 3, 4]
    assert finishing_order(one, [0, 1, 1, 1, 1, 1, 1, 1]) == [1, 2, 0, 3, 4, 5, 6, 7]  # it is not passed for ever


def test_a_request_of_a_later_place_gives_way_and_is_answered_all_the_same() -> None:
    """Memory for one and a half: the later one starts again, from what is left of it."""
    engine = Engine(model(KIND), None, replace(SMALL, cache_memory=27_000, image_share=0.1))
    params = SamplingParams(max_new_tokens=30)
    asked = [[60, 5, 9, 8], [60, 7, 3, 4]]
    answers = engine.generate([request(tokens, params=params) for tokens in asked])
    assert [answer.metrics.preemptions > 0 for answer in answers] == [False, True]
    assert engine.metrics.preemptions == answers[1].metrics.preemptions
    for answer, tokens in zip(answers, asked):
        assert answer.token_ids == alone(KIND, tuple(tokens), (), params, torch.float32).token_ids[0]


def test_decoding_goes_on_while_a_long_prompt_is_read_in_chunks() -> None:
    engine = Engine(model("text"), None, replace(SMALL, max_tokens_in_batch=9, max_requests=2))
    params = SamplingParams(max_new_tokens=12, temperature=1.5, seed=3)
    first = engine.add(Request(inputs=prompt("text", [60, 1]), params=params))
    engine.step()
    engine.add(Request(inputs=prompt("text", [60] * 40), params=params))
    tokens = len(first.events)
    for step in range(1, 6):
        engine.step()
        assert len(first.events) == tokens + step
    assert engine.metrics.computed_tokens == 2 + 5 * 9  # the fifth chunk is the last


# --- events ----------------------------------------------------------------------------------------------------------


def test_a_stream_is_the_answers_piece_by_piece() -> None:
    engine = Engine(model(KIND), None, SMALL)
    events = list(engine.stream([*good(), Request()]))
    for index, (tokens, pictures) in enumerate(GOOD):
        expected = alone(KIND, tuple(tokens), tuple(pictures), GREEDY, torch.float32)
        mine = [event for event in events if event.index == index]
        assert [event.token_id for event in mine] == expected.token_ids[0]
        assert "".join(event.text for event in mine) == expected.texts[0]  # type: ignore[index]
        assert [event.finish_reason for event in mine] == [None] * (len(mine) - 1) + expected.finish_reasons
        assert mine[-1].answer is not None and mine[-1].answer.token_ids == expected.token_ids[0]
    [failed] = [event for event in events if event.index == 3]
    assert failed.finish_reason == "error" and isinstance(failed.error, PromptError) and failed.token_id is None


def test_whoever_stops_reading_cancels() -> None:
    engine = Engine(model(KIND), None, SMALL)
    stream = engine.stream(good())
    next(stream)
    assert engine.has_work
    stream.close()
    assert engine.metrics.requests == {"cancelled": 3}
    check_whole(engine)
    untouched(engine.generate(good()))


@pytest.mark.parametrize("place", ["take", "schedule", "forward", "allocate", "token", "admitted", "finished"])
def test_an_interruption_anywhere_leaves_a_working_engine(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a step: requests that nobody gave up go on, with the same answers."""
    engine = Engine(model(KIND), None, SMALL)
    owner, name = {
        "take": (engine, "_take"), "schedule": (engine.scheduler, "computed"), "forward": (engine.runner, "forward"),
        "allocate": (engine.blocks, "allocate"), "token": (engine.metrics, "token"),
        "admitted": (engine.metrics, "admitted"), "finished": (engine.metrics, "finished"),
    }[place]  # fmt: skip
    jobs = [engine.add(one) for one in good()]
    if place != "admitted":
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            for _ in range(9):
                engine.step()
    while engine.has_work:
        engine.step()
    untouched([job.answer for job in jobs])  # type: ignore[misc]
    check_whole(engine)


def test_no_requests_no_answers() -> None:
    engine = Engine(model(KIND), None, SMALL)
    assert engine.generate([]) == [] and list(engine.stream([])) == []


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_packed_models(format: Format) -> None:
    config = replace(CONFIGS[KIND], text=replace(CONFIGS[KIND].text, intermediate_size=64))
    packed = pack(random_model(config=config), format)
    engine = Engine(packed, None, SMALL)
    params = SamplingParams(max_new_tokens=10)
    for answer, asked in zip(engine.generate([request(*one, params=params) for one in GOOD]), GOOD):
        assert answer.token_ids == generate(packed, prompt(KIND, *asked), params).token_ids[0]


def test_the_cache_must_hold_something() -> None:
    with pytest.raises(ConfigError, match="too little"):
        Engine(model("text"), None, EngineConfig(cache_memory=10))


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures() -> None:
    engine = Engine(model(KIND), None, SMALL)
    answers = engine.generate([*good(), Request()])
    figures = json.loads(json.dumps(engine.metrics.as_dict()))
    tokens = sum(len(answer.token_ids) for answer in answers)
    assert sum(figures["requests"].values()) == 4 and figures["requests"]["error"] == 1
    assert figures["generated_tokens"] == tokens
    assert figures["first_token_seconds"]["count"] == 3
    assert figures["inter_token_seconds"]["count"] == tokens - 3
    assert figures["prompt_tokens"] == sum(len(tokens) for tokens, _ in GOOD)
    assert figures["computed_tokens"] == figures["prompt_tokens"] + tokens - 3
    assert figures["blocks"]["held"] == 0 and figures["peak_blocks"] > 0
    assert figures["image_misses"] == figures["encoded_images"] == 3
    assert figures["tokens_per_second"] == pytest.approx(tokens / engine.metrics.busy_seconds)
    for answer in answers[:3]:
        times = answer.metrics
        assert times.queue_seconds is not None and times.first_token_seconds is not None
        assert 0 <= times.queue_seconds <= times.first_token_seconds <= (times.total_seconds or 0)


def test_histograms_know_their_quantiles() -> None:
    histogram = Engine(model(KIND), None, SMALL).metrics.queue_seconds
    assert histogram.quantile(0.5) is None
    for seconds in (0.001, 0.001, 0.001, 0.1, 1e9):
        histogram.add(seconds)
    assert histogram.count == 5 and histogram.total == pytest.approx(1e9 + 0.103)
    assert 0.001 <= histogram.quantile(0.5) < 0.002 and 0.1 <= histogram.quantile(0.8) < 0.2  # type: ignore[operator]
    assert histogram.quantile(1.0) == float("inf")


# --- adapters --------------------------------------------------------------------------------------------------------


def test_requests_with_different_adapters_share_a_batch() -> None:
    asked = [(one, adapter) for one in GOOD for adapter in ("first", "second", "", None)]
    expected = [
        alone(
            KIND, tuple(tokens), tuple(pictures), GREEDY, torch.float64, "first" if adapter is None else adapter
        ).token_ids[0]
        for (tokens, pictures), adapter in asked
    ]
    engine = Engine(model(KIND, torch.float64, True), None, replace(SMALL, image_share=0.2))
    for _ in range(2):  # from the cache, too
        answers = engine.generate([request(*one, adapter=adapter) for one, adapter in asked])
        assert [answer.token_ids for answer in answers] == expected
    assert expected[0] == expected[3] and expected[0] != expected[1] != expected[2] != expected[0]
    assert engine.metrics.encoded_images == 3 * 3  # each picture with each adapter
    [answer] = engine.generate([request([60, 5], adapter="frist")])
    assert 'no adapter "frist"; known: first, second; did you mean "first"?' in str(answer.error)
