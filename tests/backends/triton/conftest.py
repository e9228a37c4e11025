"""These tests run in Triton's interpreter or on a GPU; elsewhere `test_triton_suite.py` starts them in a process of
their own, because the interpreter is chosen for good when triton is first imported."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from llama_multimodal import ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
USABLE = importlib.util.find_spec("triton") is not None and (INTERPRETED or torch.cuda.is_available())
collect_ignore_glob = [] if USABLE else ["test_*.py"]


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def triton_only() -> Iterator[None]:
    """Every op on the Triton kernels, refusals as errors; memory that an op does not write holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with ops.use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)
