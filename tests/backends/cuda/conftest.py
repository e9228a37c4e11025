"""The kernels on CPU tensors, and memory in which nothing goes unseen: poisoned, and with guards on both sides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from llama_multimodal import ops
from llama_multimodal.ops import _dispatch
from llama_multimodal.ops.backends.cuda import library

from . import shim


@pytest.fixture(scope="session")
def shim_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels, compiled for the CPU once a session."""
    if why := shim.why_not():
        pytest.skip(why)
    return shim.build(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def attach(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Makes the backend "cuda" use a library on CPU tensors, until the end of the test."""
    monkeypatch.setattr(library, "_library", None)

    def use(path: Path) -> None:
        library.attach(path, "cpu")
        _dispatch.why_missing.cache_clear()

    yield use
    monkeypatch.undo()
    _dispatch.why_missing.cache_clear()


@pytest.fixture
def cuda(shim_library: Path, attach: Callable[[Path], None]) -> Iterator[None]:
    """Every op of the test runs on the CUDA kernels."""
    attach(shim_library)
    with ops.use_backend("cuda"):
        yield


@pytest.fixture(params=[0, 1, 7], ids=["first thread first", "last thread first", "mixed"])
def order(request: pytest.FixtureRequest, cuda: None) -> Iterator[None]:
    """The test runs in several orders of blocks and threads: a missing barrier shows in one of them."""
    handle = library._attached().handle
    handle.shim_order(request.param)
    yield
    handle.shim_order(0)


class Guards:
    """Hands out memory that lies between two guards, and looks at the guards in the end.

    Memory and guards are filled with 0xFF, which is NaN in every floating format: what is not written, and what is read
    past the end, shows in the result.
    """

    BYTES = 256

    def __init__(self) -> None:
        self._blocks: list[tuple[Tensor, int, int]] = []  # bytes, first and end of what is handed out
        self._inputs: list[tuple[Tensor, Tensor]] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype, offset: int = 0) -> Tensor:
        """Aligned to 64 bytes, or `offset` elements past that."""
        size = math.prod(shape) * dtype.itemsize
        first = self.BYTES + offset * dtype.itemsize
        block = torch.full((first + size + self.BYTES + -(first + size) % 64,), 255, dtype=torch.uint8)
        self._blocks.append((block, first, first + size))
        return block[first : first + size].view(dtype).view(tuple(shape))

    def input(self, x: Tensor, offset: int = 0) -> Tensor:
        """x in guarded memory, which must not change; strides are kept where x is dense or a view of something."""
        base = x.untyped_storage()
        whole = torch.empty(0, dtype=x.dtype).set_(base)  # all that x is a view of
        copy = self.empty(whole.shape, x.dtype, offset)
        copy.copy_(whole)
        self._inputs.append((copy, whole.clone()))
        return copy.as_strided(x.shape, x.stride(), copy.storage_offset() + x.storage_offset())

    def check(self) -> None:
        for block, first, end in self._blocks:
            assert (block[:first] == 255).all(), "a write before the start of a buffer"
            assert (block[end:] == 255).all(), "a write past the end of a buffer"
        for copy, before in self._inputs:
            assert torch.equal(copy.view(torch.uint8), before.view(torch.uint8)), "an input was changed"


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guards]:
    """All that the ops allocate, by `Tensor.new_empty` or `torch.empty_like`, lies between guards, too."""
    guards = Guards()
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def guarded_new_empty(self: Tensor, *shape: Any, dtype: torch.dtype | None = None) -> Tensor:
        if isinstance(self, FakeTensor):
            return new_empty(self, *shape, dtype=dtype)
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return guards.empty(sizes, dtype or self.dtype)

    def guarded_empty_like(x: Tensor, **options: Any) -> Tensor:
        if isinstance(x, FakeTensor) or options.get("memory_format") != torch.contiguous_format:
            return empty_like(x, **options)
        return guards.empty(x.shape, x.dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded_new_empty)
    monkeypatch.setattr(torch, "empty_like", guarded_empty_like)
    yield guards
    guards.check()
