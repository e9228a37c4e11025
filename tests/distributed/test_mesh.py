"""Who does what, and runs that torchrun starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Group
from restarted import FAILS_AT, STEPS
from runs import make_model, step_batches, take_step

import llama_multimodal
from llama_multimodal.distributed import ParallelConfig, make_mesh, num_readers, reader, sum_over_readers
from llama_multimodal.errors import ConfigError, DeviceError


def places(*sizes: int) -> Any:
    mesh = make_mesh(ParallelConfig(*sizes), "cpu")
    found = [mesh.get_local_rank(axis) for axis in ("data", "shard", "tensor")]
    return found, reader(mesh), num_readers(mesh), int(sum_over_readers(torch.tensor(10 ** reader(mesh)), mesh))


def test_neighbours_share_products_and_readers_are_counted(four: Group) -> None:
    assert four(places, 1, 2, 2) == [
        ([0, 0, 0], 0, 2, 11),
        ([0, 0, 1], 0, 2, 11),
        ([0, 1, 0], 1, 2, 11),
        ([0, 1, 1], 1, 2, 11),
    ]
    assert [rank[1:] for rank in four(places, 2, 0, 1)] == [(i, 4, 1111) for i in range(4)]
    assert [rank[0] for rank in four(places, 2, 0)] == [[0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]]


@pytest.mark.parametrize(
    "sizes, processes, found",
    [((1, 0, 1), 8, (1, 8, 1)), ((2, 0, 2), 8, (2, 2, 2)), ((1, 1, 8), 8, (1, 1, 8)), ((4, 2, 1), 8, (4, 2, 1))],
)
def test_shards_are_what_is_left(sizes: Any, processes: int, found: Any) -> None:
    assert ParallelConfig(*sizes).sizes(processes) == found


@pytest.mark.parametrize(
    "sizes, words",
    [
        ((1, 4, 1), "data 1 × shard 4 × tensor 1 do not make the 6 processes"),
        ((1, 0, 4), "data 1 × any number of shards × tensor 4 do not make the 6 processes"),
        ((7, 0, 1), "data 7 × any number of shards × tensor 1 do not make the 6 processes"),
    ],
)
def test_sizes_that_do_not_multiply(sizes: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"{words} of this run; change a size, or torchrun's --nproc-per-node"):
        ParallelConfig(*sizes).sizes(6)


def test_sizes_that_are_none() -> None:
    with pytest.raises(ConfigError, match="tensor must be at least 1, not 0"):
        ParallelConfig(tensor=0)
    with pytest.raises(ConfigError, match="shard must be at least 0, not -1"):
        ParallelConfig(shard=-1)


def test_one_process_needs_no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="do not make the 1 processes"):
        make_mesh(ParallelConfig(tensor=2), "cpu")
    with pytest.raises(DeviceError, match='not on "mps"'):
        make_mesh(ParallelConfig(), "mps")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="process 0 of this machine has no GPU, there are 0"):
            make_mesh(ParallelConfig(), "cuda")
    assert not dist.is_initialized()
    mesh = make_mesh(ParallelConfig(), "cpu")
    try:
        assert (reader(mesh), num_readers(mesh)) == (0, 1)
    finally:
        dist.destroy_process_group()


def test_a_store_that_restarts_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        make_mesh(ParallelConfig(), "cpu")


@pytest.mark.slow
def test_a_failed_run_starts_again_and_then_says_why_it_failed(tmp_path: Path) -> None:
    """Its first failure is made good: it goes on from its last saved step. Its second is reported, with the error of
    the process that failed and not of the one that waited for it."""
    here = Path(__file__).parent
    sources = Path(llama_multimodal.__file__).parent.parent
    paths = os.pathsep.join(map(str, (sources, here.parent, here)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "--monitor-interval", "0.2", str(here / "restarted.py"), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 1, ended.stderr
    assert "picture 7 is damaged; leave it out" in ended.stderr
    report = ended.stderr[ended.stderr.index("Root Cause") :]
    assert re.search(r"rank\s*: 1 ", report) and "picture 9 is damaged; leave it out" in report

    model = make_model("llama").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    wanted = [take_step(model, step_batches("llama", step), optimizer, None)[0] for step in range(STEPS)]
    log = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert [(int(attempt), int(step)) for attempt, step, _ in log] == [
        *((0, step) for step in range(FAILS_AT)),
        *((1, step) for step in range(FAILS_AT, STEPS)),
    ]
    assert [float(loss) for _, _, loss in log] == pytest.approx(wanted, rel=1e-9)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=1e-7)
