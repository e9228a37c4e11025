"""The Triton kernels' tests, run in Triton's interpreter on a machine without a GPU.

Whether triton interprets is settled when it is first imported, and the process of the other tests may import it for
torch.compile: so these have processes of their own, two of them, since the interpreter is slow and uses one core.
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


@pytest.mark.timeout(1800)  # two minutes on two idle cores
def test_the_triton_kernels_in_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        pytest.skip("tests/backends/triton runs in this process")
    files = sorted(FOLDER.glob("test_*.py"))
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout=900"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen([*command, *files[half::2]], env=env, **pipes) for half in range(2)]
    try:
        outputs = [process.communicate()[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)
