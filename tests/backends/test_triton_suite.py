"""The Triton kernels' tests, run in Triton's interpreter on a machine without a GPU.

Whether triton interprets is settled when it is first imported, and the process of the other tests may import it for
torch.compile: so these have a process of their own. The interpreter is slow and uses one core, so it runs beside the
other tests (tests/conftest.py), which mostly use one as well.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "triton"
_running: list[tuple[subprocess.Popen[bytes], Path]] = []


def why_not() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        return "tests/backends/triton runs in this process"
    return None


def start() -> None:
    if why_not() or _running:
        return
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout=900", str(FOLDER)]
    with tempfile.NamedTemporaryFile(prefix="triton-suite-", suffix=".log", delete=False) as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    atexit.register(process.kill)  # also where the other tests are interrupted
    _running.append((process, Path(log.name)))


@pytest.mark.beside
@pytest.mark.timeout(1800)
def test_the_triton_kernels_in_the_interpreter() -> None:
    if why := why_not():
        pytest.skip(why)
    process, log = _running[0]
    try:
        code = process.wait()
    finally:
        process.kill()
        output = log.read_text(encoding="utf-8", errors="replace")
        log.unlink()
    assert code == 0, output
    assert " passed" in output, output
