"""Decoding steps of fixed shapes: the same answers, padding that harms nobody, and steps that can be captured."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from llama_multimodal import SamplingParams, ops
from llama_multimodal.engine import Engine, EngineConfig, PromptLookup, Request
from llama_multimodal.engine.config import row_buckets
from llama_multimodal.engine.graphs import AsItIs, Compiled, _at_least, _widths
from llama_multimodal.errors import ConfigError
from llama_multimodal.quant.pack import Packing, pack

from .engine_for_tests import CONFIGS, IMAGE, alone, check_whole, model, prompt
from .test_image_sizes import ASKED as OF_ALL_SIZES
from .test_image_sizes import GREEDY, any_size
from .test_image_sizes import prompt as of_any_size

STATIC = EngineConfig(block_size=4, cache_memory="2MiB", max_requests=5, static_decode=True)
ASKED: list[tuple[list[int], list[int]]] = [
    ([60, 5, 9, 11, 3, 21, 30, 8, 7], []),
    ([60, IMAGE, 5, 9, 11, 3], [2]),
    ([60, 5, 9, 11, 3, 21, IMAGE, 30, IMAGE, 4], [1, 0]),
    ([60, 5], []),
    ([60, IMAGE, IMAGE, 8, 7], [3, 2]),
    ([60, 5, 9, 11, 3, 21, 7], []),
    ([60, 2, 3], []),
]

each_kind = pytest.mark.parametrize("kind", ["cross_attention", "splice", "text"])


def asked_of(kind: str) -> list[tuple[list[int], list[int]]]:
    return [one for one in ASKED if kind != "text" or not one[1]]


def requests_of(kind: str) -> list[Request]:
    """Answers of all lengths: each number of rows occurs."""
    params = [SamplingParams(max_new_tokens=4 + 3 * i) for i in range(len(ASKED))]
    return [Request(inputs=prompt(kind, *one), params=how) for one, how in zip(asked_of(kind), params)]


aten = torch.ops.aten
WAITING = (aten.nonzero.default, aten._local_scalar_dense.default, aten.masked_select.default)


def _indices(node: Any) -> list[Any]:
    of_tensors = node.target in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
    return [index for index in node.args[1] if index is not None] if of_tensors else []


def _is_mask(node: Any) -> bool:
    return node.meta["val"].dtype == torch.bool if "val" in node.meta else False


class Recording:
    """What a GPU does, as far as there is none: each step is traced into operators once, and these run from then on
    without any of its Python. A step that works out something from lists does not survive that, and one that reads
    numbers back is told."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        step()  # as a warm-up does
        traced = make_fx(step)()
        for node in traced.graph.nodes:
            assert node.target not in WAITING and not any(map(_is_mask, _indices(node))), f"{node} waits for the device"

        def replay() -> Tensor:
            self.replayed += 1
            return traced()

        return replay


def static_engine(kind: str, config: EngineConfig = STATIC) -> tuple[Engine, Recording]:
    engine, recording = Engine(model(kind), None, config), Recording()
    assert engine.runner.static is not None
    engine.runner.static._recorder = recording
    return engine, recording


@each_kind
@pytest.mark.parametrize("budget", [4096, 7], ids=["", "chunks"])
def test_recorded_steps_answer_as_alone(kind: str, budget: int) -> None:
    engine, recording = static_engine(kind, replace(STATIC, max_tokens_in_batch=budget))
    for _ in range(2):
        for answer, request, one in zip(engine.generate(requests_of(kind)), requests_of(kind), asked_of(kind)):
            tokens, pictures = one
            expected = alone(kind, tuple(tokens), tuple(pictures), request.params, torch.float32)
            assert answer.error is None and answer.token_ids == expected.token_ids[0]
        check_whole(engine)
    assert 1 < recording.recorded <= 16 and recording.replayed > 2 * recording.recorded


@each_kind
def test_proposed_tokens_are_rows_of_a_recorded_step(kind: str) -> None:
    """Each proposed token is a row, so that a full batch with proposals still has a shape that is large enough."""
    config = replace(STATIC, max_requests=2, speculation=PromptLookup(3, min_ngram=1))
    engine, recording = static_engine(kind, config)
    params = SamplingParams(max_new_tokens=24, temperature=0.0)
    for tokens, pictures in asked_of(kind)[:2]:
        [answer] = engine.generate([Request(inputs=prompt(kind, tokens, pictures), params=params)])
        expected = alone(kind, tuple(tokens), tuple(pictures), params, torch.float32)
        assert answer.error is None and answer.token_ids == expected.token_ids[0]
    check_whole(engine)
    assert engine.runner.static is not None and max(engine.runner.static._rows) == config.most_rows == 8
    assert engine.metrics.proposed_tokens and recording.replayed


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_over_a_cache_in_8_bits(format: str, backend: str | None) -> None:
    """By the reference too, which writes them on a GPU."""
    with ops.use_backend(backend) if backend else nullcontext():
        plain = Engine(model("cross_attention"), None, replace(STATIC, static_decode=False, cache_dtype=format))
        engine, recording = static_engine("cross_attention", replace(STATIC, cache_dtype=format))
        requests = requests_of("cross_attention")
        wanted = [answer.token_ids for answer in plain.generate(requests)]
        assert [answer.token_ids for answer in engine.generate(requests)] == wanted
    assert recording.replayed


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_padding_harms_nobody(packed: bool) -> None:
    """Three rows in a step for four: what is in the requests' blocks is the same as without padding."""
    engines = []
    for static in (True, False):
        text = model("text")
        if packed:
            text = type(text)(CONFIGS["text"]).eval()
            text.load_state_dict(model("text").state_dict())
            pack(text, Packing("int8", group=16))
        engine = Engine(text, None, replace(STATIC, static_decode=static))
        requests = requests_of("text")[:3]
        params = SamplingParams(max_new_tokens=12)
        engines.append((engine, engine.generate([replace(request, params=params) for request in requests])))
    (static, ours), (plain, theirs) = engines
    assert [answer.token_ids for answer in ours] == [answer.token_ids for answer in theirs]
    assert static.plan.padding_blocks == 2 and static.plan.num_blocks == plain.plan.num_blocks - 2
    written = 0
    for cache, other in zip((*static.runner.keys, *static.runner.values), (*plain.runner.keys, *plain.runner.values)):
        used = torch.tensor(sorted(static.blocks._by_key.values()))  # full blocks of both, by name
        at = torch.tensor([plain.blocks._by_key[static.blocks._keys[block]] for block in used.tolist()])  # type: ignore
        torch.testing.assert_close(cache[used], other[at], rtol=1e-5, atol=1e-5)  # type: ignore[index]
        written += int(cache[-2:].count_nonzero())  # type: ignore[index]
    assert written and static.runner.nbytes == static.plan.nbytes <= 2 << 20


def test_pictures_with_gaps_between_them_go_without() -> None:
    engine = Engine(any_size(), None, STATIC)
    plain = Engine(any_size(), None, replace(STATIC, static_decode=False))
    requests = [Request(inputs=of_any_size(*one), params=GREEDY) for one in OF_ALL_SIZES]
    wanted = [answer.token_ids for answer in plain.generate(requests)]
    assert [answer.token_ids for answer in engine.generate(requests)] == wanted


@pytest.mark.slow
def test_warm_up_records_every_number_of_rows() -> None:
    engine, recording = static_engine("cross_attention")
    engine.warm_up()
    assert recording.recorded == 2 * len(row_buckets(5))  # with images and without
    engine.generate(requests_of("cross_attention"))
    assert recording.recorded <= 2 * len(row_buckets(5))  # no row has more than 64 tokens: 16 blocks
    engine.clear_cache()
    engine.generate(requests_of("cross_attention")[:1])
    assert recording.recorded > 2 * len(row_buckets(5))  # what was recorded is forgotten with the cache


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("text", {}),
        ("cross_attention", {"cache_dtype": "int8"}),
        ("text", {"adapted": True}),
        ("text", {"rows": 17}),
        ("cross_attention", {"packing": Packing("bf16")}),
        ("text", {"packing": Packing("int8", 16)}),
    ],
    ids=["", "images, int8", "adapters", "bf16, many rows", "packed blocks", "packed blocks without a kernel"],
)
def test_steps_compile_as_one_graph_and_once(kind: str, settings: dict[str, Any]) -> None:
    """No break, no second graph for a step, and no bound on how many steps there are."""
    torch._dynamo.reset()
    rows, adapted = settings.get("rows", 2), settings.get("adapted", False)
    made = model(kind, torch.bfloat16 if rows > 2 else torch.float32, adapted)
    if "packing" in settings:
        made = pack(copy.deepcopy(made), settings["packing"])
    config = replace(STATIC, max_requests=rows, cache_dtype=settings.get("cache_dtype"), static_decode=None)
    engine, counter = Engine(made, None, replace(config, compile=True)), CompileCounterWithBackend("eager")
    static = engine.runner.static
    assert static is not None and isinstance(static._recorder, Compiled)
    static._recorder = Compiled(AsItIs(), counter)
    names = ("first", "second") if adapted else (None,)
    params = [SamplingParams(max_new_tokens=n, temperature=0.0) for n in (7, 4)]
    requests = [replace(one, params=how) for one, how in zip(requests_of(kind), params)]
    requests = [replace(one, adapter=names[i % len(names)]) for i, one in enumerate(requests * (rows // 2 + 1))][:rows]
    with (
        torch._dynamo.config.patch(error_on_recompile=True, recompile_limit=1),
        warnings.catch_warnings(record=True) as told,
    ):
        answers = engine.generate(requests)
    assert not [warning for warning in told if "cannot be compiled" in str(warning.message)]
    assert [answer.error for answer in answers] == [None] * rows
    wanted = Engine(made, None, config).generate(requests)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in wanted]
    assert counter.frame_count == len(static._steps) >= 2


def test_a_step_that_cannot_be_compiled_runs_as_it_is() -> None:
    def no_compiler(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no working C++ compiler\nand what else there is to say")

    engine = Engine(model("text"), None, replace(STATIC, compile=True, max_requests=1))
    assert engine.runner.static is not None
    engine.runner.static._recorder = Compiled(AsItIs(), no_compiler)
    [request] = requests_of("text")[:1]
    with pytest.warns(UserWarning, match="a decoding step cannot be compiled and runs as it is: .*no working C"):
        [answer] = engine.generate([request])
    expected = alone("text", tuple(ASKED[0][0]), (), request.params, torch.float32)
    assert answer.token_ids == expected.token_ids[0]


def test_only_steps_of_fixed_shapes_are_compiled() -> None:
    with pytest.raises(ConfigError, match="compile=True is for steps of fixed shapes; leave static_decode=False out"):
        EngineConfig(static_decode=False, compile=True)


def test_sizes() -> None:
    assert row_buckets(1) == (1,) and row_buckets(5) == (1, 2, 4, 5) and row_buckets(32) == (1, 2, 4, 8, 16, 32)
    assert _widths(3) == (3,) and _widths(100) == (16, 64, 100)
    assert _at_least((1, 2, 4, 5), 3) == 4 and _at_least((1, 2), 3) is None


def test_a_cpu_decodes_without_padding_unless_asked() -> None:
    engine = Engine(model("text"), None, replace(STATIC, static_decode=None))
    assert engine.runner.static is None and engine.plan.padding_blocks == 0
    engine.warm_up()
