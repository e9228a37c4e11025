"""The golden files of `tests/golden`, and this project's models loaded from the checkpoints there."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import llama_multimodal as lmm
from llama_multimodal.inputs import ModelInputs

GOLDEN = Path(__file__).parents[1] / "golden"


def _inputs_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_inputs", GOLDEN / "inputs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


formulas = _inputs_module()


@dataclass(frozen=True)
class Case:
    """One batch that the reference has computed."""

    name: str
    rows: list[list[int]]
    images: list[list[np.ndarray]]
    logits: list[Tensor]  # for each row [T, vocab], or its last `keep` positions
    prompt: int | None  # tokens of the prompt where the rest was decoded one by one


class Golden:
    """A checkpoint in Meta's layout and what the reference makes of it."""

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, GOLDEN / name
        self.params: dict[str, Any] = json.loads((self.folder / "params.json").read_text())
        self.facts: dict[str, Any] = json.loads((self.folder / "facts.json").read_text())
        with np.load(self.folder / "vision.npz") as file:
            self.vision = {key: torch.from_numpy(file[key]) for key in file}
        with np.load(self.folder / "logits.npz") as file:
            self._logits = {key: torch.from_numpy(file[key]) for key in file}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, processor = lmm.load(self.folder, dtype=torch.float32, device="cpu")
        return model.eval(), processor

    @property
    def model(self) -> Any:
        return self._loaded[0]

    @property
    def processor(self) -> Any:
        return self._loaded[1]

    @property
    def case_names(self) -> list[str]:
        return sorted({key.rsplit(".", 1)[0] for key in self._logits})

    def case(self, name: str) -> Case:
        vocab, tile = self.params["vocab_size"], self.params["vision_chunk_size"]
        body = formulas.cases(vocab, tile)[name]
        return Case(
            name,
            [formulas.tokens(row, vocab) for row in body["rows"]],
            [[formulas.image(*size) for size in row] for row in body["images"]],
            [self._logits[f"{name}.{i}"] for i in range(len(body["rows"]))],
            body.get("prompt"),
        )

    def encode(self, case: Case) -> ModelInputs:
        return self.processor.encode_tokens(case.rows, images=case.images)

    @torch.inference_mode()
    def error(self, case: Case) -> float:
        """The greatest absolute difference of any logit of the case."""
        logits = self.model(self.encode(case)).logits
        vocab = self.params["vocab_size"]
        worst = 0.0
        for ours, row, theirs in zip(logits, case.rows, case.logits, strict=True):
            assert ours.shape[1] == vocab and theirs.shape[1] == vocab
            worst = max(worst, (ours[: len(row)][-len(theirs) :] - theirs).abs().max().item())
        return worst


_MODELS = {name: Golden(name) for name in ("mllama", "mllama_mp2")}


@pytest.fixture(params=_MODELS)
def any_golden(request: pytest.FixtureRequest) -> Golden:
    """Each checkpoint: one shard in bfloat16, and two model-parallel shards in float32."""
    return _MODELS[request.param]


@pytest.fixture
def golden() -> Golden:
    """The larger checkpoint, which has every case."""
    return _MODELS["mllama"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`model_name, case_name`: every stored case; `fault`: every fault the cases are known to exclude."""
    if "case_name" in metafunc.fixturenames:
        pairs = [(model, case) for model, golden in _MODELS.items() for case in golden.case_names]
        metafunc.parametrize("model_name, case_name", pairs, ids=[f"{model}-{case}" for model, case in pairs])
    if "fault" in metafunc.fixturenames:
        metafunc.parametrize("fault", _MODELS["mllama"].facts["faults: max abs change of the logits"])


@pytest.fixture
def golden_of(model_name: str) -> Golden:
    return _MODELS[model_name]


@pytest.fixture(scope="session")
def chat() -> dict[str, Any]:
    return json.loads((GOLDEN / "chat_format.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Makes a kind of `families_for_tests.KINDS` once a module: a `Pair` of our model and transformers'."""
    from families_for_tests import pair  # skips where transformers is not installed; other tests here go without

    return functools.cache(lambda name: pair(name, tmp_path_factory.mktemp("pair")))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Such small products take longer to share than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
