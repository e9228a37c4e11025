"""How the kernels are bound: signatures, errors, reasons, and what torch asks of an op."""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from llama_multimodal import ops
from llama_multimodal.errors import DeviceError
from llama_multimodal.ops import _dispatch
from llama_multimodal.ops.backends import cuda as package
from llama_multimodal.ops.backends.cuda import library
from llama_multimodal.ops.backends.cuda.library import Launcher

from ..references import FLOATS, name_of, randn
from . import shim

C_TYPES = {"int64_t": ctypes.c_int64, "int": ctypes.c_int, "float": ctypes.c_float}


def launchers() -> list[Launcher]:
    modules = (importlib.import_module(f"{package.__name__}.{name}") for name in package._MODULES)
    return [value for module in modules for value in vars(module).values() if isinstance(value, Launcher)]


def declared() -> dict[str, list[type]]:
    """What each launcher of the sources takes."""
    found = {}
    for file in sorted(shim.CSRC.glob("*.cu")):
        for name, parameters in re.findall(r'extern "C" int llama_mm_(\w+)\(([^)]*)\) \{', file.read_text()):
            types = [re.sub(r"\s*\w+$", "", p.strip()).removeprefix("const ") for p in parameters.split(",") if p]
            found[name] = [ctypes.c_void_p if t.endswith("*") else C_TYPES[t] for t in types]
    return found


def test_launchers_are_bound_as_they_are_declared() -> None:
    sources = declared()
    bound = {launcher.name: list(launcher.types) for launcher in launchers()}
    assert bound.items() <= sources.items()
    assert sources.keys() - bound.keys() == {"probe", "synchronize"}  # bound where they are called


@pytest.mark.usefixtures("cuda")
def test_an_error_names_the_op_and_says_what_cuda_says(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r"^rms_norm: CUDA error 1, "):
        monkeypatch.setitem(library._attached().functions, "rms_norm", lambda *_: 1)
        ops.rms_norm(randn(2, 8), randn(8), 1e-5)


@pytest.mark.usefixtures("cuda")
def test_debugging_waits_for_each_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong while a kernel runs is known only after waiting for it."""
    waited = []
    monkeypatch.setitem(library._attached().functions, "synchronize", lambda stream: waited.append(stream) or 719)
    ops.swiglu(randn(8))
    assert not waited
    monkeypatch.setattr(library, "_WAIT", True)
    with pytest.raises(DeviceError, match=r"^swiglu: CUDA error 719, "):
        ops.swiglu(randn(8))
    assert waited == [None]


@pytest.mark.usefixtures("cuda")
def test_tensors_must_be_where_the_library_works() -> None:
    with pytest.raises(DeviceError, match="x is on meta; takes tensors on cpu"):
        ops.rms_norm(randn(2, 8).to("meta"), randn(8).to("meta"), 1e-5)


# --- reasons ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str | None]:
    """What the library is found to be on a machine made up here."""
    monkeypatch.setattr(library, "_library", None)

    def find(devices: bool = True, version: str | None = "13.0", file: bytes | None = b"", probe: int = 0) -> Any:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: devices)
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
        monkeypatch.setattr(library, "build_report", lambda backend: {"archs": ["sm_75", "sm_90"]})
        monkeypatch.setattr(library, "why_not_built", lambda backend: "not built" if file is None else None)
        path = tmp_path / "lib.so"
        path.write_bytes(file or b"")
        monkeypatch.setattr(library, "library_path", lambda backend: path)
        if file == b"good":
            handle = SimpleNamespace(llama_mm_probe=Probe(probe), llama_mm_error_string=lambda code: b"no kernel image")
            monkeypatch.setattr(ctypes, "CDLL", lambda path: handle)
        return library.find()

    return find


class Probe:
    """A function of the library; ctypes' own let their types be set, and so does this."""

    argtypes: Any = None
    restype: Any = None

    def __init__(self, code: int) -> None:
        self.code = code

    def __call__(self) -> int:
        return self.code


@pytest.mark.parametrize(
    "facts, reason",
    [
        ({"devices": False}, "there is no CUDA device"),
        ({"devices": False, "version": None}, "there is no CUDA device (torch was built without CUDA)"),
        ({"file": None}, "not built"),
        ({"file": b"no library"}, "its library cannot be loaded"),
        (
            {"file": b"good", "probe": 209},
            "its library does not run on this sm_61 (it is built for sm_75 sm_90; no kernel image)",
        ),
    ],
)
def test_why_the_backend_cannot_be_used(machine: Callable[..., str | None], facts: Any, reason: str) -> None:
    found = machine(**facts)
    assert found is not None and found.startswith(reason)
    assert library._library is None
    with pytest.raises(DeviceError, match="not loaded"):
        library._attached()


def test_a_library_that_runs_here_is_found(machine: Callable[..., str | None]) -> None:
    assert machine(file=b"good") is None and library._attached().device_type == "cuda"
    assert machine(devices=False) is None  # found once is found


# --- what torch asks -------------------------------------------------------------------------------------------------


def samples(dtype: torch.dtype, gradients: bool) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for each op, contiguous and not."""

    def some(*shape: int) -> Tensor:
        return randn(*shape, dtype=dtype).requires_grad_(gradients)

    heads = some(2, 3, 4, 16).transpose(1, 2)  # [2, 4, 3, 16]
    angles, table, places = randn(2, 3, 8), randn(5, 8), torch.tensor([[0, 4, 1], [2, 2, 3]])
    return {
        "cuda_rms_norm": [(some(3, 16), some(16), 1e-5), (some(2, 16, 8).transpose(1, 2), some(16), 1e-5)],
        "cuda_add_rms_norm": [(some(3, 16), some(3, 16), some(16), 1e-5)],
        "cuda_rms_norm_backward": [(some(3, 8).detach(), None, some(3, 8).detach(), some(8).detach(), 1e-5)],
        "cuda_apply_rope": [
            (heads, some(2, 1, 3, 16), angles, angles, None, False, False),
            (heads, some(2, 1, 3, 16), table, table, places, True, True),
        ],
        "cuda_swiglu": [(some(3, 8), some(3, 8)), (some(2, 5, 6), None)],
        "cuda_swiglu_backward": [(some(3, 8).detach(), some(3, 8).detach(), some(3, 8).detach())],
        "cuda_linear_gelu": [(some(2, 3, 4).detach(), some(5, 4).detach(), some(5).detach(), "tanh")],
    }


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("op", samples(torch.float32, False))
def test_opcheck(op: str, gradients: bool, dtype: torch.dtype) -> None:
    """Schema, fake implementation, autograd and functionalisation, with static and dynamic shapes."""
    function = getattr(torch.ops.llama_mm, op).default
    for arguments in samples(dtype, gradients)[op]:
        torch.library.opcheck(function, arguments, rtol=1e-2, atol=1e-2)


def block(x: Tensor, residual: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, wide: Tensor) -> Tensor:
    """All ops of this folder in a row."""
    normed, residual = ops.add_rms_norm(ops.rms_norm(x, weight, 1e-5), residual, weight, 1e-5)
    q = normed.unflatten(-1, (2, 8)).transpose(1, 2)
    q, k = ops.apply_rope(q, q[:, :1], cos, sin)
    mixed = (q + k).transpose(1, 2).flatten(2)
    return residual + ops.swiglu(ops.linear_gelu(mixed, wide, None, "tanh"))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_a_compiled_graph_has_no_break_and_is_compiled_once(gradients: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (3, 5, 9):
        x, residual = randn(2, tokens, 16), randn(2, tokens, 16, seed=1)
        fixed = (randn(16), *ops.rope_angles(torch.arange(tokens).expand(2, -1), ops.rope_frequencies(8, 100.0, None)))
        wide = randn(32, 16, seed=2).requires_grad_(gradients)
        x.requires_grad_(gradients)
        expected, ours = block(x, residual, *fixed, wide), compiled(x, residual, *fixed, wide)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        if gradients:
            for a, b in zip(torch.autograd.grad(ours.sum(), (x, wide)), torch.autograd.grad(expected.sum(), (x, wide))):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_forced_and_reference_agree(dtype: torch.dtype) -> None:
    x, weight = randn(4, 64, dtype=dtype), randn(64, dtype=dtype, seed=1)
    ours = ops.rms_norm(x, weight, 1e-5)
    with ops.use_backend("torch"):
        reference = ops.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(ours, reference)
    assert {"rms_norm", "add_rms_norm", "apply_rope", "swiglu", "linear_gelu"} <= {
        op for op, backend in _dispatch._kernels if backend == "cuda"
    }


@pytest.mark.usefixtures("cuda")
def test_steps_past_32_bits() -> None:
    """Two rows 2³¹ elements apart, in memory of which only they are ever touched."""
    far = torch.empty(2**31 + 2 * 32, dtype=torch.float16).as_strided((2, 64), (2**31, 1))
    far.copy_(randn(2, 64))
    near, weight, angles = far.clone(), randn(64, dtype=torch.float16), randn(1, 1, 32)
    assert torch.equal(ops.rms_norm(far, weight, 1e-5), ops.rms_norm(near, weight, 1e-5))
    assert torch.equal(ops.swiglu(far), ops.swiglu(near))
    as_heads = (x.unflatten(1, (1, 1, 64)) for x in (far, near))  # [2, 1, 1, 64]
    ours, expected = (ops.apply_rope(q, q, angles, angles)[0] for q in as_heads)
    assert torch.equal(ours, expected)
