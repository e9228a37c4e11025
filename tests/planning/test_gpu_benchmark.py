"""`benchmarks/throughput.py --gpu`, which needs a GPU, tried out on the CPU at a tiny size; and `--roofline`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "throughput.py"
TOY = ("--gpu", "--shape", "toy", "--device", "cpu", "--tokens", "6", "--batch-sizes", "1", "3", "--repeats", "1")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, SCRIPT, *arguments], env=env, capture_output=True, text=True)


def test_every_part_is_measured(tmp_path: Path) -> None:
    done = run(*TOY, "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "throughput_gpu.json").read_text())["results"]["rows"]
    one = {
        f"{weights}, {what}" for weights in ("bf16", "int4") for what in ("to the first token", "each token behind it")
    }
    assert set(rows) == one | {"bf16, 1 at a time, a step", "bf16, 3 at a time, a step"}
    for name, row in rows.items():
        assert name in done.stdout and row["seconds"] > 0 and row["floor_seconds"] is None
    three = rows["bf16, 3 at a time, a step"]
    assert three["tokens_per_second"] == pytest.approx(3 / three["seconds"])


def test_what_does_not_fit_into_the_time_is_left_out() -> None:
    done = run(*TOY, "--seconds", "0")
    assert done.returncode == 0 and "stopped: building and what comes behind it does not fit into 0 s" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run("--gpu")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "there is no CUDA GPU here; --shape toy --device cpu tries the program out\n"


def test_the_table_of_the_docs_is_what_is_computed() -> None:
    done = run("--roofline")
    assert done.returncode == 0 and done.stdout.count("\n") == 2 + 3 * 2 * 3
    assert done.stdout in (SCRIPT.parents[1] / "docs" / "benchmarks.md").read_text()
