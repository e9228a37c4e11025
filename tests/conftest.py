"""How the tests are spread: the whole suite over two processes a file at a time, a part of it in this one alone.

Most tests use one core, and tests of one file share what they build. Files marked `first` take minutes, so they begin
before the others: at the end neither process waits long for the other.
"""

from __future__ import annotations

import os

import pytest
import torch

PROCESSES = 2


@pytest.hookimpl(optionalhook=True)  # `make gpu` does without the plugin
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    whole = config.args == config.getini("testpaths") and not (config.option.keyword or config.option.lf)
    return min(PROCESSES, os.cpu_count() or 1) if whole else 0


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of the processes: it leaves their share of the cores to the others
        threads = max(1, torch.get_num_threads() // PROCESSES)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of the processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("first") is None)  # stable: nothing else moves
