"""benchmarks/ops.py, which a GPU is needed for, tried out on the CPU at tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_multimodal.cli.doctor import OPS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ops.py"


def run(*arguments: str | Path) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_op_is_measured_beside_its_peers(tmp_path: Path) -> None:
    text = run("--device", "cpu", "--quick", "--repeats", "2", "--seconds", "1000", "--output", tmp_path)
    result = json.loads((tmp_path / "ops-cpu.json").read_text())
    assert result["torch"] == torch.__version__ and result["copy_gb_per_s"] > 0 and result["not_begun"] == []
    rows = result["rows"].values()
    without = {"fp8_linear", "linear", "prepare_weight", "decode_blocks", "paged_decode_blocks"}  # no kernels of ours
    assert {row["op"] for row in rows} == set(OPS) - without
    for name, row in result["rows"].items():
        assert name in text and row["left_out"].keys() <= {"liger"}, row["left_out"]
        assert {"copy", "eager", "torch.compile"} <= row["us"].keys()
        for times in row["us"].values():
            assert 0 < times["p20"] <= times["median"] <= times["p80"]
        if row["best"] is not None:
            ratio = row["us"]["eager"]["median"] / row["us"][row["best"]]["median"]
            assert row["times_as_fast_as"]["eager"] == pytest.approx(ratio)
    if "cpu" not in result["missing"]:
        assert {row["op"] for row in rows if "cpu" in row["us"]} >= {"decode_attention", "cross_attention"}


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "skipped, there is no GPU" in run()


def test_a_candidate_that_computes_something_else_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import ops
    from ops_rows import TINY

    row = next(row for row in TINY if row.op == "swiglu")
    monkeypatch.setattr(ops, "by_liger", lambda op: lambda gate, up: gate * up)
    result = ops.measure(row, "cpu", 2, "aot_eager")
    assert "liger" not in result["us"] and "differs from eager torch" in result["left_out"]["liger"]


def test_floors_of_known_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from ops_rows import decode_attention, packed_linear, rms_norm

    assert rms_norm(1024, 4096).cost.bytes == 2 * 1024 * 4096 * 2
    keys = decode_attention(1, 32, 8, 4096, 128).cost
    assert keys.bytes == 2 * 8 * 4096 * 128 * 2 + 2 * 32 * 128 * 2
    assert keys.floor(3e12, 790e12) == pytest.approx(keys.bytes / 3e12)
    assert packed_linear(1, 4096, 14336, "int4").cost.bytes == 4096 * 14336 * (4 + 0.5) / 8 + (4096 + 14336) * 2
