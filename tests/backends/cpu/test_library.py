"""Which library and instruction set are loaded, and that automatic choice finds the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_multimodal import ops
from llama_multimodal.errors import DeviceError
from llama_multimodal.ops import _dispatch
from llama_multimodal.ops.backends.cpu import library

from ..references import randn

OPS = [
    "add_rms_norm", "apply_rope", "cross_attention", "decode_attention", "decode_blocks", "kv_write", "packed_linear",
    "paged_decode_attention", "paged_decode_blocks", "prepare_weight", "quantized_kv_write",
    "quantized_paged_decode_attention", "rms_norm", "swiglu",
]  # fmt: skip


def test_the_ops_with_kernels(attached: None) -> None:
    some = {"attention": library.has_attention(torch.float32), "linear": library.has_wide_linear()}
    expected = sorted([*OPS, *(op for op, there in some.items() if there)])
    assert [op for op, backends in ops.available().items() if "cpu" in backends] == expected


def test_kernels_are_chosen_for_cpu_tensors(attached: None) -> None:
    """Each of them refuses what its reference takes."""
    q, k = randn(1, 2, 16), randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match="row 0: its length must be from 0 to the cache's 4 slots"):
        ops.decode_attention(q, k, k, torch.tensor([5], dtype=torch.int32))
    assert ops.prepare_weight(ops.pack_weight(randn(1, 32), "int8")).layout == "cpu tiles"
    grown = q.clone().requires_grad_()  # the reference has a backward
    assert ops.decode_attention(grown, k, k, torch.tensor([4], dtype=torch.int32)).requires_grad


def test_a_library_that_was_not_built_says_so(attached: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_library", None)
    monkeypatch.setattr(library, "why_not_built", lambda backend: "its library is not built: no luck")
    with pytest.raises(DeviceError, match='"cpu" cannot be used here: its library is not built: no luck'):
        ops.use_backend("cpu").__enter__()
    assert ops.available() == {} or "cpu" not in ops.available().get("packed_linear", [])
    _dispatch.why_missing.cache_clear()
    broken = tmp_path / "libllama_mm_cpu.so"
    broken.write_text("not a library")
    monkeypatch.setattr(library, "why_not_built", lambda backend: None)
    monkeypatch.setattr(library, "library_path", lambda backend: broken)
    with pytest.raises(DeviceError, match="its library cannot be loaded"):
        ops.use_backend("cpu").__enter__()


def test_an_instruction_set_that_is_not_there_says_so(attached: None, monkeypatch: pytest.MonkeyPatch) -> None:
    best = library.instruction_set()
    assert not library.use_instruction_set("sse9") and library.instruction_set() == best
    monkeypatch.setattr(library, "_instruction_set", "")
    monkeypatch.setenv("LLAMA_MM_CPU_ISA", "sse9")
    _dispatch.why_missing.cache_clear()
    with pytest.raises(DeviceError, match='LLAMA_MM_CPU_ISA asks for "sse9"; this machine has no such thing'):
        ops.use_backend("cpu").__enter__()


@pytest.mark.parametrize("asked, found", [("plain", b"plain"), ("sse9", None)])
def test_the_environment_chooses(library_file: Path, asked: str, found: bytes | None) -> None:
    """Read once, when the library is loaded."""
    code = f"""
import ctypes
name = ctypes.CDLL({str(library_file)!r}).llama_mm_cpu_instruction_set
name.restype = ctypes.c_char_p
print(name())
"""
    environment = {**os.environ, "LLAMA_MM_CPU_ISA": asked}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(found)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_library_shares_torch_s_openmp(attached: None) -> None:
    """Two OpenMP libraries would keep two sets of threads, which fight for the cores."""
    maps = Path("/proc/self/maps").read_text()
    loaded = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line or "libiomp" in line}
    assert len(loaded) == 1, loaded
