"""How the tests are spread: the whole suite over two processes a file at a time, a part of it in this one alone.

Most tests use one core, and tests of one file share what they build. Files marked `first` take minutes, so they begin
before the others: at the end neither process waits long for the other. Tests marked `slow` are left out of the whole
suite; whoever names a part of it, or some marks, gets what is named.
"""

from __future__ import annotations

import os

import pytest
import torch

PROCESSES = 2


@pytest.hookimpl(optionalhook=True)  # `make gpu` does without the plugin
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    return min(PROCESSES, os.cpu_count() or 1) if _whole(config) else 0


def _whole(config: pytest.Config) -> bool:
    """Whether nothing was named that is to be run."""
    return config.args == config.getini("testpaths") and not (config.option.keyword or config.option.lf)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of the processes: it leaves their share of the cores to the others
        threads = max(1, torch.get_num_threads() // PROCESSES)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of the processes that tests start


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _whole(config) and not config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    items.sort(key=lambda item: item.get_closest_marker("first") is None)  # stable: nothing else moves
