"""Processes of a run: none outlives the one that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy_task import ToyRecipe

from llama_multimodal.errors import TrainingError
from llama_multimodal.train.config import Report
from llama_multimodal.train.launch import launch
from llama_multimodal.train.parallel import Group

WORKER = """
import time
from llama_multimodal.train.launch import end_with_parent
end_with_parent()
print(flush=True)
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {WORKER!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def die(recipe: ToyRecipe, group: Group, report: Report) -> None:
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.sum(torch.zeros(1))


def test_a_process_that_is_killed_ends_the_run(tmp_path: Path) -> None:
    recipe = ToyRecipe(output=str(tmp_path), steps=1, processes=2)
    with pytest.raises(TrainingError, match=r"process 1 of this run was killed \(SIGKILL\)"):
        launch(die, recipe, lambda progress: None)


def test_a_worker_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)  # it is there
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if _is_zombie(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker went on for 10 s")


def _is_zombie(pid: int) -> bool:
    """It has ended, and nobody has asked for its result."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
