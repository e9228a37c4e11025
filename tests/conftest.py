"""What runs beside the other tests: suites in processes of their own start first, and are asked for last."""

from __future__ import annotations

import pytest


def is_beside(item: pytest.Item) -> bool:
    return item.get_closest_marker("beside") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=is_beside)  # stable: nothing else moves


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.option.collectonly:
        for item in session.items:
            if is_beside(item):
                item.module.start()  # type: ignore[attr-defined]
