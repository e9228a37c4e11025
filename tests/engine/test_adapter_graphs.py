"""Adapters in steps of fixed shapes: rows of several share a recorded step, and those that come and go are followed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from llama_multimodal import LoraConfig, SamplingParams, apply_lora, generate, use_adapter
from llama_multimodal.adapters.lora import merge_lora, remove_adapter
from llama_multimodal.engine import Engine, Request
from llama_multimodal.engine.config import row_buckets
from llama_multimodal.models import LanguageModel
from llama_multimodal.quant.pack import Packing, pack

from .engine_for_tests import CONFIGS, KIND, alone, check_whole, model, prompt
from .test_graphs import STATIC, Recording, asked_of, each_kind, requests_of

PARAMS = SamplingParams(max_new_tokens=12, temperature=0.0)
PROMPT = [60, 33, 12, 40, 2]


def recorded(made: LanguageModel, **changes: int) -> tuple[Engine, Recording]:
    engine, recording = Engine(made, None, replace(STATIC, **changes)), Recording()
    assert engine.runner.static is not None
    engine.runner.static._recorder = recording
    return engine, recording


def add(made: LanguageModel, name: str, seed: int, **settings: object) -> None:
    """An adapter that changes the answers."""
    given: dict[str, object] = {"rank": 3, "targets": ("self", "mlp"), **settings}
    apply_lora(made, LoraConfig(**given), name).eval()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in made.named_parameters():
            if "lora." in path and f".{name}." in path:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def ask(adapter: str | None, tokens: Sequence[int] = PROMPT) -> Request:
    return Request(inputs=prompt("text", tokens), params=PARAMS, adapter=adapter)


def by_itself(made: LanguageModel, adapter: str | None) -> list[int]:
    with use_adapter(made, adapter or None):
        return generate(made, prompt("text", PROMPT), PARAMS).token_ids[0]


@each_kind
def test_rows_of_several_adapters_share_recorded_steps(kind: str) -> None:
    names = ("first", "second", "")
    engine, recording = recorded(model(kind, adapted=True), max_requests=8)
    before = 0
    for turn in range(2):
        requests = [
            replace(one, params=PARAMS, adapter=names[(i + turn) % 3]) for i, one in enumerate(requests_of(kind))
        ]
        answers = engine.generate(requests)
        for answer, request, one in zip(answers, requests, asked_of(kind)):
            tokens, pictures = one
            wanted = alone(kind, tuple(tokens), tuple(pictures), request.params, torch.float32, request.adapter)
            assert answer.error is None and answer.token_ids == wanted.token_ids[0]
        longest = max(len(answer.token_ids) for answer in answers)
        assert longest - 4 <= recording.replayed - before <= longest  # one step for all rows, whatever they have
        before = recording.replayed
        check_whole(engine)
    assert engine.runner.static is not None and any(shape.adapters for shape in engine.runner.static._steps)


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_adapters_of_all_kinds(packed: bool) -> None:
    """Of other ranks and layers, with DoRA, over packed weights; rows without one beside them and by themselves."""
    made = type(model("text"))(CONFIGS["text"]).eval()
    made.load_state_dict(model("text").state_dict())
    if packed:
        pack(made, Packing("int8", group=16))
    add(made, "small", 1, targets=("layers.1.attention.qkv.q_proj", "layers.2.mlp.down_proj"), rank=2)
    add(made, "long", 2, rank=5, dora=True)
    add(made, "plain", 3)
    names = ("long", "", "small", "plain", "long")
    wanted = {name: by_itself(made, name) for name in names}
    assert len({tuple(tokens) for tokens in wanted.values()}) == 4
    engine, recording = recorded(made)
    for asked in (names, ("", ""), ("small",)):
        answers = engine.generate([ask(name) for name in asked])
        assert [answer.token_ids for answer in answers] == [wanted[name] for name in asked]
    assert engine.runner.static is not None and recording.replayed > 20
    assert {shape.adapters for shape in engine.runner.static._steps} == {False, True}


@pytest.mark.slow
def test_adapters_that_come_and_go_while_others_answer() -> None:
    made = copy.deepcopy(model("text", adapted=True))
    wanted = {name: by_itself(made, name) for name in ("first", "second", "")}
    engine, recording = recorded(made)
    jobs = [engine.add(ask(name)) for name in ("first", "")]
    for _ in range(4):
        engine.step()
    count = recording.recorded
    assert count
    add(made, "third", 5)
    old = by_itself(made, "third")
    jobs += [engine.add(ask(name)) for name in ("third", "second")]
    for _ in range(4):
        engine.step()
    assert recording.recorded > count  # a step that reads all four, not one of three
    gone = engine.add(ask("third"))
    while jobs[2].answer is None:
        engine.step()
    assert gone.answer is None or gone.answer.error is None
    late = engine.add(replace(ask("third", [60, 2, 3]), params=replace(PARAMS, max_new_tokens=40)))
    for _ in range(3):
        engine.step()
    remove_adapter(made, "third")
    while engine.has_work:
        engine.step()
    answers = [job.answer for job in jobs]
    assert [answer and answer.token_ids for answer in answers] == [wanted["first"], wanted[""], old, wanted["second"]]
    assert late.answer is not None and 'the adapter "third" was removed before' in str(late.answer.error)
    add(made, "third", 6)  # another one: what the cache holds of the first is not for it
    new = by_itself(made, "third")
    assert new != old
    [answer] = engine.generate([ask("third")])
    assert answer.token_ids == new
    remove_adapter(made)
    answers = engine.generate([ask(""), ask(None)])
    assert [answer.token_ids for answer in answers] == [wanted[""]] * 2
    check_whole(engine)


def test_a_merged_adapter_answers_in_recorded_steps() -> None:
    made = copy.deepcopy(model("text", adapted=True))
    wanted, plain = by_itself(made, "second"), by_itself(made, "")
    engine, recording = recorded(made)
    assert engine.generate([ask("")])[0].token_ids == plain
    merge_lora(made, "second")
    engine.clear_cache()
    before = recording.replayed
    assert engine.generate([ask(None)])[0].token_ids == wanted and recording.replayed > before


@pytest.mark.slow
def test_warm_up_records_steps_with_adapters_and_without() -> None:
    engine, recording = recorded(model(KIND, adapted=True))
    engine.warm_up()
    assert recording.recorded == 4 * len(row_buckets(5))  # each with images and without
    requests = [replace(one, adapter=("first", "second", "")[i % 3]) for i, one in enumerate(requests_of(KIND))]
    engine.generate(requests)
    assert recording.recorded == 4 * len(row_buckets(5))
