"""Speculation: answers as without it, whoever proposes; what is rolled back; what is counted."""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from llama_multimodal import SamplingParams
from llama_multimodal.config import LanguageModelConfig
from llama_multimodal.engine import DraftModel, Engine, EngineConfig, PromptLookup, Request, Speculation
from llama_multimodal.engine.proposals import Drafts, _Occurrences
from llama_multimodal.errors import ConfigError
from llama_multimodal.models import LanguageModel, build_model
from llama_multimodal.sampling import adjusted_logits

from .engine_for_tests import CONFIGS, IMAGE, alone, check_accounts, check_whole, model, prompt, stranger

SMALL = EngineConfig(block_size=4, cache_memory="1MiB")
GREEDY = SamplingParams(max_new_tokens=16)
LONG = [[60, 32, 0, 2, 3, 49, 59], [60, 40, 43, 15], [60, 14]]  # answered at length; the first answer repeats itself


def itself(kind: str = "text", count: int = 4) -> DraftModel:
    return DraftModel(model(kind), count)


def engine_of(speculation: Speculation | None, kind: str = "text", **more: Any) -> Engine:
    return Engine(model(kind), None, replace(SMALL, speculation=speculation, **more))


def corrupt(engine: Engine, share: float, seed: int = 0) -> None:
    """Some of what the draft model proposes is replaced by anything."""
    drafts, rng = engine.proposer, random.Random(seed)
    assert isinstance(drafts, Drafts)
    choose = drafts._choose
    drafts._choose = lambda *given: rng.randrange(60) if rng.random() < share else choose(*given)  # type: ignore[method-assign]


# --- acceptance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [
    GREEDY,
    replace(GREEDY, temperature=1.0, seed=7),
    replace(GREEDY, temperature=1.5, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=3),
    replace(GREEDY, temperature=1.0),
])  # fmt: skip
def test_a_draft_that_is_the_model_itself_is_always_right(params: SamplingParams) -> None:
    """Drawn answers too, with a seed or freely: both draw with the same noise."""
    torch.manual_seed(0)
    engine = engine_of(itself())
    answers = engine.generate([Request(inputs=prompt("text", tokens), params=params) for tokens in LONG])
    for answer, tokens in zip(answers, LONG):
        assert answer.metrics.acceptance_rate == 1 and answer.metrics.proposed_tokens > 0
        if params.seed is not None or params.temperature == 0:
            assert answer.token_ids == alone("text", tuple(tokens), (), params, torch.float32).token_ids[0]
    assert engine.metrics.acceptance_rate == 1
    longest = max(len(answer.token_ids) for answer in answers)
    assert engine.metrics.steps == 1 + -(-(longest - 1) // 5)  # the prompts, then five tokens a step
    check_whole(engine)


@pytest.mark.parametrize("speculation", [PromptLookup(3, min_ngram=1), DraftModel(stranger(), 3), itself(count=2)])
def test_what_is_counted(speculation: Speculation) -> None:
    engine = engine_of(speculation)
    answers = engine.generate([Request(inputs=prompt("text", tokens), params=GREEDY) for tokens in LONG])
    figures = json.loads(json.dumps(engine.metrics.as_dict()))
    proposed = [answer.metrics.proposed_tokens for answer in answers]
    accepted = [answer.metrics.accepted_tokens for answer in answers]
    assert figures["proposed_tokens"] == sum(proposed) > 0 and figures["accepted_tokens"] == sum(accepted)
    assert figures["acceptance_rate"] == pytest.approx(sum(accepted) / sum(proposed))
    assert all(0 <= a <= p for a, p in zip(accepted, proposed))
    generated = sum(len(answer.token_ids) for answer in answers)
    assert figures["generated_tokens"] == generated
    # Besides what was rejected nothing is computed twice, and of an answer's last token nobody reads what it says.
    rejected = sum(proposed) - sum(accepted)
    assert figures["computed_tokens"] == sum(map(len, LONG)) + generated - len(LONG) + rejected
    assert engine_of(None).metrics.as_dict()["acceptance_rate"] is None


# --- distribution ----------------------------------------------------------------------------------------------------

WORDS = 4


@functools.cache
def small(seed: int) -> LanguageModel:
    """A model of few tokens, sure of little."""
    text = replace(
        CONFIGS["long"].text, vocab_size=WORDS, num_extra_embeddings=60, eos_token_ids=(), max_position_embeddings=64
    )
    torch.manual_seed(seed)
    made = build_model(LanguageModelConfig(text))
    with torch.no_grad():
        made.decoder.embedding.weight.mul_(5)
        made.decoder.lm_head.weight.mul_(8)
    return made.double().eval()


def exact(tokens: list[int], params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probability of every answer of four tokens, from the logits alone."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(4):
        longer = {}
        for answer, probability in found.items():
            row = [*tokens, *answer]
            logits = small(0)(prompt("text", row)).logits[0, -1]
            for token, p in enumerate(adjusted_logits(logits, params, set(row)).softmax(-1).tolist()):
                if p:
                    longer[*answer, token] = probability * p
        found = longer
    return found


def chi_square(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """The probability of a fit as bad as this one, by Pearson's test; answers that are rare go together."""
    number = sum(counts.values())
    assert set(counts) <= set(expected), "an answer that is ruled out"
    cells = [(counts[answer], number * p) for answer, p in expected.items() if number * p >= 5]
    rest = number - sum(n for n, _ in cells), number - sum(e for _, e in cells)
    if rest[1] >= 5:
        cells.append(rest)
    statistic = torch.tensor(sum((n - e) ** 2 / e for n, e in cells), dtype=torch.float64)
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2, dtype=torch.float64), statistic / 2))


@pytest.mark.parametrize("proposer", ["stranger", "lookup"])
@pytest.mark.parametrize("params, seeded", [
    (SamplingParams(max_new_tokens=4, temperature=1.0), False),
    (SamplingParams(max_new_tokens=4, temperature=1.3, top_k=3, top_p=0.95, min_p=0.02, repetition_penalty=1.2), True),
])  # fmt: skip
def test_drawn_answers_have_the_models_distribution(params: SamplingParams, proposer: str, seeded: bool) -> None:
    torch.manual_seed(0)
    tokens, count = [3, 1, 2, 0, 0, 1, 2, 3, 3, 1, 2], 1500
    speculation = DraftModel(small(1), 2) if proposer == "stranger" else PromptLookup(2, 2, 1)
    config = replace(SMALL, speculation=speculation, max_requests=250, cache_memory="8MiB")
    engine = Engine(small(0), None, config)
    inputs = prompt("text", tokens)
    answers = engine.generate(
        [Request(inputs=inputs, params=replace(params, seed=i if seeded else None)) for i in range(count)]
    )
    with torch.inference_mode():
        expected = exact(tokens, params)
    counts = Counter(tuple(answer.token_ids) for answer in answers)
    assert chi_square(counts, expected) > 0.001
    metrics = engine.metrics
    assert metrics.proposed_tokens > count and 0.02 < (metrics.acceptance_rate or 0) < 0.9  # it does reject


# --- rolling back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("speculation", [itself(count=5), PromptLookup(6, min_ngram=1)])
def test_what_was_rejected_leaves_nothing_behind(size: int, speculation: Speculation) -> None:
    """After each step: blocks for what is computed and no more, and names of what was said alone. At the end every
    named block holds what a plain engine computes, in the draft model's cache too."""
    engine, plain = engine_of(speculation, block_size=size), engine_of(None, block_size=size)
    if isinstance(engine.proposer, Drafts):
        corrupt(engine, 0.3)
    params = replace(GREEDY, max_new_tokens=30)
    inputs = prompt("text", LONG[0])
    [expected] = plain.generate([Request(inputs=inputs, params=params)])
    job = engine.add(Request(inputs=inputs, params=params))
    names = set()
    while engine.has_work:
        engine.step()
        check_accounts(engine)
        names |= set(engine.blocks._by_key)
    assert job.answer is not None and job.answer.token_ids == expected.token_ids
    assert 0 < job.metrics.accepted_tokens < job.metrics.proposed_tokens
    assert names <= set(plain.blocks._by_key) and len(names) >= len(plain.blocks._by_key) - 6 // size - 1
    caches = [engine.runner]
    if isinstance(engine.proposer, Drafts):
        caches.append(engine.proposer._runner)
    for key in names:
        ours, theirs = engine.blocks._by_key[key], plain.blocks._by_key[key]
        for cache in caches:
            for mine, other in zip([*cache.keys, *cache.values], [*plain.runner.keys, *plain.runner.values]):
                torch.testing.assert_close(mine[ours], other[theirs], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["cross_attention", "splice"])
def test_pictures_are_not_touched(kind: str) -> None:
    engine = engine_of(DraftModel(stranger(), 3), kind)
    tokens, pictures = (60, 5, IMAGE, 3, 9), (2,)
    job = engine.add(Request(inputs=prompt(kind, tokens, pictures), params=GREEDY))
    engine.step()
    pools = [*engine.runner.image_keys, *engine.runner.image_values]
    pools += [] if engine.runner.embeddings is None else [engine.runner.embeddings]
    before = [pool.clone() for pool in pools]
    held = engine.images.num_held
    while engine.has_work:
        assert engine.images.num_held == held
        engine.step()
    assert job.answer is not None
    assert job.answer.token_ids == alone(kind, tokens, pictures, GREEDY, torch.float32).token_ids[0]
    assert job.metrics.accepted_tokens < job.metrics.proposed_tokens and engine.metrics.encoded_images == 1
    assert all(torch.equal(pool, old) for pool, old in zip(pools, before))


def test_image_tokens_are_not_proposed() -> None:
    engine = engine_of(PromptLookup(4, min_ngram=1), "splice")
    proposed: list[int] = []
    take = engine._take
    engine._take = lambda job, *more: (proposed.extend(job.proposed), take(job, *more))[1]  # type: ignore[method-assign, assignment]
    inputs = prompt("splice", [60, *itertools.chain(*([token, IMAGE] for token in range(0, 60, 20))), 5], [0, 0, 0])
    params = replace(GREEDY, max_new_tokens=20, temperature=1.5)
    engine.generate([Request(inputs=inputs, params=replace(params, seed=seed)) for seed in range(8)])
    assert proposed and IMAGE not in proposed


# --- the scheduler ---------------------------------------------------------------------------------------------------


def test_proposals_keep_to_the_steps_tokens_and_make_nobody_give_way() -> None:
    """Seven tokens a step for three requests, and blocks for their answers alone."""
    for speculation in (PromptLookup(6, min_ngram=1), itself(count=6)):
        engine = engine_of(speculation, max_tokens_in_batch=7, max_requests=3, block_size=1)
        engine.blocks.allocate(engine.blocks.num_blocks - sum(len(tokens) + GREEDY.max_new_tokens for tokens in LONG))
        most = 0
        forward = engine.runner.forward

        def watched(segments: Any, forward: Callable[..., Any] = forward) -> Any:
            nonlocal most
            most = max(most, sum(end - first for _, first, end in segments))
            return forward(segments)

        engine.runner.forward = watched  # type: ignore[method-assign]
        answers = engine.generate([Request(inputs=prompt("text", tokens), params=GREEDY) for tokens in LONG])
        for answer, tokens in zip(answers, LONG):
            assert answer.token_ids == alone("text", tuple(tokens), (), GREEDY, torch.float32).token_ids[0]
        assert most == 7 and engine.metrics.preemptions == 0 and engine.metrics.proposed_tokens > 0


@pytest.mark.parametrize("where", ["draft", "model", "between"])
def test_an_interruption_leaves_a_working_engine(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(itself())
    corrupt(engine, 0.3)
    assert isinstance(engine.proposer, Drafts)
    jobs = [engine.add(Request(inputs=prompt("text", tokens), params=GREEDY)) for tokens in LONG]
    engine.step()
    owner = {"draft": (engine.proposer._runner, "forward"), "model": (engine.runner, "forward"),
             "between": (engine.scheduler, "accepted")}[where]  # fmt: skip
    calls = 0
    original = getattr(*owner)

    def interrupted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(*owner, interrupted)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(9):
            engine.step()
    while engine.has_work:
        engine.step()
        check_accounts(engine)
    for job, tokens in zip(jobs, LONG):
        assert job.answer is not None
        assert job.answer.token_ids == alone("text", tuple(tokens), (), GREEDY, torch.float32).token_ids[0]
    check_whole(engine)


@pytest.mark.parametrize("stumbling", [1, 2])
def test_a_draft_that_fails_ends_its_request_alone(stumbling: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first reading of a step, or while it goes on."""
    engine = engine_of(itself())
    assert isinstance(engine.proposer, Drafts)
    runner = engine.proposer._runner
    forward = runner.forward
    bad = Request(inputs=prompt("text", LONG[1]), params=GREEDY)

    def failing(segments: Any) -> Any:
        for job, _, end in segments:
            if job.request is bad and len(job.tokens) == 5 and end == 4 + stumbling:
                raise RuntimeError("a kernel has stumbled")
        return forward(segments)

    monkeypatch.setattr(runner, "forward", failing)
    answers = engine.generate([Request(inputs=prompt("text", LONG[0]), params=GREEDY), bad])
    assert answers[0].token_ids == alone("text", tuple(LONG[0]), (), GREEDY, torch.float32).token_ids[0]
    assert str(answers[1].error) == "a kernel has stumbled" and len(answers[1].token_ids) == 1
    check_whole(engine)


# --- look-up ---------------------------------------------------------------------------------------------------------


def test_the_last_occurrence_of_the_longest_n_gram_is_found() -> None:
    """Against a plain search, while the tokens grow."""
    rng = random.Random(0)
    for smallest, largest in ((1, 1), (1, 3), (2, 4)):
        tokens: list[int] = []
        occurrences = _Occurrences(range(smallest, largest + 1))
        for _ in range(200):
            tokens += [rng.randrange(4) for _ in range(rng.randrange(1, 4))]
            expected = None
            for size in range(largest, smallest - 1, -1):
                ends = [e for e in range(size, len(tokens)) if tokens[e - size : e] == tokens[-size:]]
                if ends and len(tokens) >= size:
                    expected = ends[-1]
                    break
            assert occurrences.last(tokens) == expected


def test_what_repeats_is_proposed_over_and_over() -> None:
    engine = engine_of(PromptLookup(7, min_ngram=2))
    job = engine.add(Request(inputs=prompt("text", [60, 5, 9, 11, 5, 9, 11, 5, 9]), params=GREEDY))
    engine._prepare(job)
    assert engine.proposer is not None
    engine.proposer.propose([], {job: 7})
    assert job.proposed == [11, 5, 9, 11, 5, 9, 11]


# --- settings --------------------------------------------------------------------------------------------------------


def test_a_draft_of_another_vocabulary() -> None:
    with pytest.raises(ConfigError, match=f"the draft model has {WORDS} tokens and the model 64.*same tokenizer"):
        engine_of(DraftModel(small(0)))


@pytest.mark.parametrize("make, message", [
    (lambda: PromptLookup(0), "num_tokens must be at least 1, not 0"),
    (lambda: PromptLookup(min_ngram=5), "min_ngram must be from 1 to max_ngram, 4, not 5"),
    (lambda: PromptLookup(min_ngram=0), "min_ngram must be from 1"),
    (lambda: DraftModel(stranger(), 0), "num_tokens must be at least 1"),
    (lambda: DraftModel("some/model"), "model must be a loaded language model, as `load` gives, not str"),
    (lambda: EngineConfig(speculation="lookup"), r"speculation must be PromptLookup\(\), .* not 'lookup'"),
    (lambda: EngineConfig(speculation=PromptLookup), "speculation must be PromptLookup"),
    (lambda: EngineConfig(static_decode="off"), "static_decode must be True, False or None, not 'off'"),
])  # fmt: skip
def test_settings_out_of_range(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_drafts_cache_is_part_of_the_memory() -> None:
    plain, drafted = engine_of(None), engine_of(itself())
    assert drafted.plan.block_bytes == 2 * plain.plan.block_bytes
    assert drafted.plan.num_blocks == plain.plan.num_blocks // 2
    assert drafted.nbytes == drafted.plan.nbytes <= 2**20 and drafted.runner.nbytes == drafted.nbytes // 2
