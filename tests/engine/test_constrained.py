"""Answers that follow a grammar, by the embedded model's tokenizer and a model that would say anything."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import pytest
import torch

from llama_multimodal import SamplingParams
from llama_multimodal.engine import DraftModel, Engine, EngineConfig, Grammars, PromptLookup, Request
from llama_multimodal.errors import MissingExtraError, PromptError
from llama_multimodal.models import LanguageModel, build_model
from llama_multimodal.processing.processor import Processor
from llama_multimodal.processing.tokenizer import Tokenizer
from llama_multimodal.zoo.registry import EMBEDDED_FOLDER

from .engine_for_tests import CONFIGS

pytest.importorskip("llguidance")
HOT = SamplingParams(max_new_tokens=60, temperature=2.0, seed=0)
SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle", "cross"]}, "count": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["shape", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer.load(EMBEDDED_FOLDER)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> LanguageModel:
    eos, pad = tokenizer.special("<|eot_id|>"), tokenizer.special("<|finetune_right_pad_id|>")
    ids = {"bos_token_id": tokenizer.special("<|begin_of_text|>"), "eos_token_ids": (eos,), "pad_token_id": pad}
    text = replace(CONFIGS["text"].text, vocab_size=tokenizer.vocab_size, max_position_embeddings=256, **ids)
    torch.manual_seed(0)
    return build_model(replace(CONFIGS["text"], text=text)).eval()


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer, model: LanguageModel) -> Grammars:
    return Grammars(tokenizer, model)


@pytest.fixture
def engine(model: LanguageModel, tokenizer: Tokenizer) -> Engine:
    config = EngineConfig(cache_memory="1MiB", block_size=4)
    return Engine(model, Processor(model.config, tokenizer), config)


def question(text: str = "What?") -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_each_request_keeps_to_its_own_grammar(engine: Engine, grammars: Grammars) -> None:
    regex, schema = grammars.regex("[0-9]{3}-[a-f]{2}"), grammars.json_schema(SCHEMA)
    lark = grammars.lark('start: "yes" | "no" " " /[a-z]/')
    requests = [
        Request(question(), replace(HOT, seed=seed), constraint=constraint)
        for seed in range(4)
        for constraint in (regex, schema, lark, None)
    ]
    answers = engine.generate(requests)
    for first in range(0, 16, 4):
        number, shape, word, free = answers[first : first + 4]
        assert [a.finish_reason for a in (number, shape, word)] == ["stop"] * 3
        assert re.fullmatch("[0-9]{3}-[a-f]{2}", number.text)
        found = json.loads(shape.text)
        assert set(found) == {"shape", "count"} and found["shape"] in ("circle", "cross") and 0 <= found["count"] < 100
        assert re.fullmatch("yes|no [a-z]", word.text)
        assert free.token_ids == engine.generate([replace(requests[first + 3])])[0].token_ids
    assert len({answers[i].text for i in range(0, 16, 4)}) > 1


@pytest.mark.parametrize("params", [HOT, SamplingParams(max_new_tokens=60)])
@pytest.mark.parametrize("method", ["lookup", "draft"])
def test_proposed_tokens_keep_to_the_grammar(
    engine: Engine, grammars: Grammars, method: str, params: SamplingParams
) -> None:
    """Proposals know nothing of a grammar; what is not allowed is never accepted, and the answers stay the same."""
    speculation = PromptLookup(4, min_ngram=1) if method == "lookup" else DraftModel(engine.model, 3)
    config = replace(engine.config, speculation=speculation)
    speculating = Engine(engine.model, engine.processor, config)
    constraints = [grammars.regex("(ab|cd){3,9}"), grammars.json_schema(SCHEMA), None]
    requests = [Request(question(), params, constraint=constraint) for constraint in constraints]
    plain, answers = engine.generate(requests), speculating.generate(requests)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in plain]
    assert 0 < speculating.metrics.accepted_tokens < speculating.metrics.proposed_tokens
    assert re.fullmatch("(ab|cd){3,9}", answers[0].text) and json.loads(answers[1].text)


def test_greedy_takes_the_likeliest_of_what_is_allowed(engine: Engine, grammars: Grammars) -> None:
    params = SamplingParams(max_new_tokens=20)
    [answer] = engine.generate([Request(question(), params, constraint=grammars.regex("[a-z]{4,8}"))])
    assert re.fullmatch("[a-z]{4,8}", answer.text)


def test_an_interruption_keeps_to_the_grammar(engine: Engine, grammars: Grammars) -> None:
    job = engine.add(Request(question(), HOT, constraint=grammars.regex("[0-9]{9}")))
    for _ in range(4):
        engine.step()
    engine.clear_cache()  # begins again behind what was said, as after an interruption or a preemption
    while engine.has_work:
        engine.step()
    assert job.answer is not None and re.fullmatch("[0-9]{9}", job.answer.text)


@pytest.mark.parametrize(
    "kind, given, message",
    [
        ("regex", "[0-9", "regular expression is not valid"),
        ("lark", "begin: /a/", "grammar is not valid"),
        ("json_schema", {"type": "nothing"}, "JSON schema is not valid"),
        ("json_schema", "{", "JSON schema cannot be read"),
    ],
)
def test_what_is_no_grammar(grammars: Grammars, kind: str, given: object, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        getattr(grammars, kind)(given)


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, model: LanguageModel) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match="constrained"):
        Grammars(tokenizer, model)
