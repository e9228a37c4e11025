"""The CPU's stand-in for a GPU sees what it is there to see: each kernel here is wrong, and is told so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama_multimodal import ops
from llama_multimodal.errors import DeviceError
from llama_multimodal.ops.backends.cuda import library
from llama_multimodal.ops.backends.cuda.library import INT64, POINTER, Launcher

from .. import references
from ..references import randn
from . import shim

HEAD = '#include "common.cuh"\n'
KERNELS = {
    # A block's sum, with and without what makes it right.
    "reversed": "__shared__ float all[64]; all[threadIdx.x] = x[threadIdx.x]; __syncthreads();"
    "out[threadIdx.x] = all[63 - threadIdx.x];",
    "warp_sum": "out[threadIdx.x] = sum_lanes(x[threadIdx.x]);",
    "branches": "if (threadIdx.x < 40) __syncthreads();",
    "two_places": "if (threadIdx.x < 32) __syncthreads(); else {\n __syncthreads();\n }",
    "lanes_missing": "if (threadIdx.x % 32 < 8) out[0] = sum_lanes(1.0f);",
    "lanes_apart": "if (threadIdx.x % 2)\n __syncwarp();\n else\n __syncwarp();",
    "outside_mask": "__shfl_sync(0xffu << threadIdx.x / 8 % 4 * 8, 1.0f, 31);",
    "barrier_and_lanes": "if (threadIdx.x < 16) __syncthreads(); else __syncwarp();",
    "misaligned": "store(out + 1, load<float, 4>(x));",
    "past_an_array": "__shared__ float all[64]; all[threadIdx.x + size] = 0; out[0] = all[0];",
    "past_dynamic": "reinterpret_cast<float*>(dynamic_shared)[threadIdx.x + size] = 0;",
    "too_many_threads": "",
    "too_much_shared": "",
}
LAUNCH = {"too_many_threads": "dim3(1), dim3(1025), 0", "too_much_shared": "dim3(1), dim3(64), 49153"}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory, shim_library: Path) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    shutil.copy(shim.CSRC / "common.cuh", folder)
    source = [HEAD]
    for name, body in KERNELS.items():
        source.append(f"__global__ void {name}(const float* x, float* out, int64_t size) {{ {body} }}")
        source.append(f'extern "C" int llama_mm_{name}(void* x, void* out, int64_t size, void* stream) {{')
        shape = LAUNCH.get(name, "dim3(2), dim3(64), 256")
        source.append(f"return launch({name}, {shape}, stream, x, out, size); }}")
    (folder / "kernels.cu").write_text("\n".join(source))
    reuse = [shim_library.parent / f"{name}.o" for name in ("library", "fibers")]
    return shim.build(folder, [folder / "kernels.cu"], reuse)


@pytest.fixture
def run(kernels: Path, attach: Callable[[Path], None]) -> Callable[..., torch.Tensor]:
    attach(kernels)

    def start(name: str, size: int = 0) -> torch.Tensor:
        out = torch.zeros(68)
        x = torch.arange(64.0)
        Launcher(name, POINTER, POINTER, INT64)(x.device, x.data_ptr(), out.data_ptr(), size)
        return out[:64]

    return start


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_what_is_right_runs(run: Callable[..., torch.Tensor], seed: int) -> None:
    library._attached().handle.shim_order(seed)
    assert torch.equal(run("reversed"), torch.arange(63.0, -1, -1))
    assert torch.equal(run("warp_sum"), torch.tensor([496.0, 1520]).repeat_interleave(32))
    run("past_an_array")
    run("past_dynamic")
    library._attached().handle.shim_order(0)


@pytest.mark.parametrize(
    "name, code, message",
    [
        ("branches", 719, r"divergent barrier: thread \(0, 0, 0\) waits at kernels.cu:\d+, thread .* has returned"),
        ("two_places", 719, r"divergent barrier: thread \(0, 0, 0\) waits at kernels.cu:\d+, .* at kernels.cu:\d+"),
        ("lanes_missing", 719, r"thread \(0, 0, 0\) waits at common.cuh:\d+ for lanes that do not come"),
        ("lanes_apart", 719, "lanes of one warp meet at different places"),
        ("outside_mask", 719, "reads a lane outside the mask"),
        ("barrier_and_lanes", 719, "for lanes that do not come"),
        ("misaligned", 716, r"misaligned address at common.cuh:\d+, in block \(0, 0, 0\)"),
        ("past_an_array", 719, r"index out of bounds of an array at kernels.cu:\d+"),
        ("past_dynamic", 719, "a write past the block's 256 bytes of dynamic shared memory"),
        ("too_many_threads", 9, "invalid configuration"),
        ("too_much_shared", 1, "49153 bytes of dynamic shared memory"),
    ],
)
def test_what_is_wrong_is_told(run: Callable[..., torch.Tensor], name: str, code: int, message: str) -> None:
    with pytest.raises(DeviceError, match=f"{name}: CUDA error {code}, .*{message}"):
        run(name, size=1)
    assert torch.equal(run("reversed"), torch.arange(63.0, -1, -1))  # the next launch is not harmed


BARRIER = "__syncthreads();"
BARRIERS = (shim.CSRC / "rms_norm.cu").read_text().count(BARRIER)


@pytest.mark.parametrize("barrier", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, BARRIERS))])
def test_a_removed_barrier_is_seen(
    barrier: int, tmp_path: Path, shim_library: Path, attach: Callable[[Path], None]
) -> None:
    """Without any one of the barriers of rms_norm.cu the results are wrong in some order of the threads."""
    pieces = (shim.CSRC / "rms_norm.cu").read_text().split(BARRIER)
    pieces[barrier : barrier + 2] = ["".join(pieces[barrier : barrier + 2])]
    shutil.copy(shim.CSRC / "common.cuh", tmp_path)
    broken = tmp_path / "rms_norm.cu"
    broken.write_text(BARRIER.join(pieces))
    attach(shim.build(tmp_path, [broken], [shim_library.parent / f"{name}.o" for name in ("library", "fibers")]))
    wrong = []
    for seed in (0, 1, 7):
        library._attached().handle.shim_order(seed)
        for size in (16, 2048):
            x, weight = randn(40, size).requires_grad_(), randn(size, seed=1).requires_grad_()
            leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
            with ops.use_backend("cuda"):
                ours = ops.rms_norm(x, weight, 1e-5)
            expected = references.rms_norm(*leaves, 1e-5)
            got = (ours, *torch.autograd.grad(ours.sum(), (x, weight)))
            wanted = (expected, *torch.autograd.grad(expected.sum(), leaves))
            wrong.append(any(not torch.allclose(a.double(), b, atol=1e-3) for a, b in zip(got, wanted)))
    assert any(wrong)
