"""Two processes for the tests of this folder, and four for those that cut a model both ways."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
from ranks import Group, Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    started = Ranks()
    yield started
    started.close()


@pytest.fixture
def two(ranks: Ranks) -> Group:
    return partial(ranks, 2)


@pytest.fixture
def four(ranks: Ranks) -> Group:
    return partial(ranks, 4)
