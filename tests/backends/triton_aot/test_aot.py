"""Every Triton kernel compiles for every generation of GPUs, and none needs more registers than there are."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "aot.py"
ARCHS = ("80", "90", "100")  # in bf16; the script alone does fp32 and fp16 too
KERNELS = {
    "rms_norm": ("forward", "backward"),
    "rope": ("rope",),
    "swiglu": ("forward", "backward"),
    "linear_gelu": ("bias_gelu",),
    "decode_attention": ("attend", "join"),
    "kv_write": ("store", "store_in_8_bits"),
    "cross_attention": ("forward", "backward_q", "backward_kv"),
    "packed_linear": ("packed_linear",),
    "linear_cross_entropy": ("meet", "slopes"),
}


def compile_for(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, in which triton compiles and does not interpret."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, SCRIPT, *arguments], env=env, capture_output=True, text=True)


@pytest.fixture(autouse=True, scope="module")
def compiler() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_kernel_spills() -> None:
    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(ARCHS, pool.map(lambda arch: compile_for(arch, "bfloat16"), ARCHS)))
    for arch, process in done.items():
        assert process.returncode == 0, f"sm_{arch}\n{process.stdout}\n{process.stderr}"
        assert all(f" FORMAT={format}, " in process.stdout for format in range(3)), "caches: plain, int8, fp8"
        for file, kernels in KERNELS.items():
            for kernel in kernels:
                assert f"| {file} | `{kernel}<" in process.stdout, f"{kernel} of {file} was not compiled for sm_{arch}"


def test_a_spill_is_seen() -> None:
    process = compile_for("90", "bfloat16", "swiglu", "maxnreg=24")
    assert process.returncode == 1 and "B stack" in process.stdout, process.stderr
