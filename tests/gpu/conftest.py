"""Without a GPU these tests are skipped; on one, both of its backends must be there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llama_multimodal import ops
from llama_multimodal.ops import _dispatch

BACKENDS = ("cuda", "triton")

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts: products give the same bits again


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="there is no GPU")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every op of the test on one backend, refusals as errors."""
    if why := _dispatch.why_missing(request.param):
        pytest.fail(f'backend "{request.param}" cannot be used here: {why}; `make gpu` builds what there is to build')
    with ops.use_backend(request.param):
        yield request.param


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that an op does not write holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
