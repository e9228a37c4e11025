"""Decoding steps that are captured as CUDA graphs: the same tokens as without, on every backend."""

from __future__ import annotations

import pytest
import torch
from small_model import IMAGE, make_inputs, random_model

from llama_multimodal import SamplingParams
from llama_multimodal.engine import Engine, EngineConfig, Request
from llama_multimodal.engine.graphs import CudaGraphs

ROWS = [[60, 5, 9, IMAGE, 4, 33, 2], [60, 7, 11], [IMAGE, 3, IMAGE, 8], [60, 2], [60, IMAGE, 3]]
GRIDS: list[list[tuple[int, int]]] = [[(1, 2)], [], [(1, 1), (3, 1)], [], [(2, 2)]]


@pytest.mark.parametrize("format", [None, "int8"])
def test_replayed_steps_answer_as_others(backend: str, format: str | None) -> None:
    model = random_model().to("cuda")
    requests = [
        Request(inputs=make_inputs([row], [grid]), params=SamplingParams(max_new_tokens=6 + 4 * i))
        for i, (row, grid) in enumerate(zip(ROWS, GRIDS))
    ]
    found = []
    for static in (False, None):
        config = EngineConfig(
            block_size=16, cache_memory="16MiB", max_requests=4, cache_dtype=format, static_decode=static
        )
        engine = Engine(model, None, config)
        engine.warm_up()
        for _ in range(2):
            found.append([answer.token_ids for answer in engine.generate(requests)])
    assert engine.runner.static is not None and isinstance(engine.runner.static._recorder, CudaGraphs)
    assert found[0] == found[1] == found[2] == found[3]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
