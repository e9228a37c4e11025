"""The Triton kernels' tests, run in Triton's interpreter on a machine without a GPU.

Whether triton interprets is settled when it is first imported, and the process of the other tests may import it for
torch.compile: so these have a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "triton"


def why_not() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        return "tests/backends/triton runs in this process"
    return None


@pytest.mark.first
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_triton_kernels_in_the_interpreter(marked: str) -> None:
    if why := why_not():
        pytest.skip(why)
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "--timeout=900", "-m", marked]
    run = subprocess.run([*command, str(FOLDER)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = run.stdout.decode(errors="replace")
    assert run.returncode == 0, output
    assert " passed" in output, output
