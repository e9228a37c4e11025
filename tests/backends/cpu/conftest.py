"""The CPU kernels, built from the sources as they are, on every instruction set that this machine has."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llama_multimodal import ops
from llama_multimodal.ops import _dispatch
from llama_multimodal.ops.backends.cpu import library

from ..cuda.conftest import Guards, guards

__all__ = ["Guards", "guards"]

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def library_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, built by setup.py's own function; what it compiled before it does not compile again."""
    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    file = tmp_path_factory.mktemp("cpu") / "libllama_mm_cpu.so"
    try:
        setup.build_cpu(Path(library.__file__).parent / "csrc", file)
    except setup.NotBuilt as why:
        pytest.skip(str(why))
    return file


@pytest.fixture
def attached(library_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend uses that library until the end of the test, and is chosen as always."""
    monkeypatch.delenv("LLAMA_MM_BACKEND", raising=False)
    monkeypatch.setattr(library, "_library", None)
    monkeypatch.setattr(library, "_instruction_set", "")
    library.attach(library_file)
    _dispatch.why_missing.cache_clear()
    yield
    monkeypatch.undo()
    _dispatch.why_missing.cache_clear()


@pytest.fixture
def cpu(attached: None) -> Iterator[None]:
    """Every op of the test runs on the CPU kernels, on the best instruction set."""
    with ops.use_backend("cpu"):
        yield


@pytest.fixture(params=library.INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, cpu: None) -> Iterator[str]:
    """The test runs on each instruction set that this machine has."""
    before = library.instruction_set()
    if not library.use_instruction_set(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    library.use_instruction_set(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """More threads than this machine may have, so that work is split in more parts."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
