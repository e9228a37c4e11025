"""Helpers of OpenMP: a thread lets its own go, and an engine in a thread of its own has the cores to itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

HELPERS = """
import os, sys, threading
sys.path.insert(0, sys.argv[1])
import torch
from llama_multimodal.engine.threads import release_threads

def helpers():
    return len(os.listdir("/proc/self/task")) - len(threading.enumerate())

def compute():
    return torch.randn(2, 1 << 20).exp().sum().item()

torch.set_num_threads(2)
before = helpers()
compute()
"""


def run(program: str) -> None:
    tests = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", HELPERS + program, str(tests)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or "OpenMP" not in torch.__config__.parallel_info(), reason="counts OpenMP's Linux threads"
)


def test_a_thread_lets_its_helpers_go_and_gets_others() -> None:
    run("""
assert helpers() == before + 1
release_threads()
release_threads()
assert helpers() == before
expected = compute()
assert helpers() == before + 1
""")


def test_helpers_of_the_thread_that_made_the_engine_are_gone() -> None:
    run("""
import asyncio
from engine.test_async import make, request
from llama_multimodal.engine import AsyncEngine

async def ask(engine):
    async with AsyncEngine(engine) as asking:
        assert helpers() == before
        await asking.generate(request(1))

engine = make()
compute()
assert helpers() == before + 1
asyncio.run(ask(engine))
""")
